# SPDX-License-Identifier: Apache-2.0
# cnllama._cuda, the engine on an NVIDIA GPU: a module of its own that needs neither driver nor GPU to be built or
# imported. CNLLAMA_CUDA: AUTO builds it where nvcc is found, ON insists, OFF does without.
set(CNLLAMA_CUDA AUTO CACHE STRING "Build the CUDA back end: AUTO, ON or OFF")
set_property(CACHE CNLLAMA_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT CNLLAMA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CNLLAMA_CUDA is '${CNLLAMA_CUDA}', expected AUTO, ON or OFF")
endif()
if(CNLLAMA_CUDA STREQUAL "OFF" OR CNLLAMA_SANITIZE)
  return()
endif()

# Turing, Ampere (also Ada), Hopper, and code for later ones that the driver translates.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-virtual 90a-real)
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(CNLLAMA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CNLLAMA_CUDA is ON and there is no nvcc: install the CUDA toolkit (12.8 or later) and set "
      "CUDACXX to its nvcc, or set CNLLAMA_CUDA to AUTO")
  endif()
  message(STATUS "No nvcc: cnllama is built without CUDA")
  return()
endif()
enable_language(CUDA)
# CMake knew nvcc's option for C++20 only long after its version 3.20.
foreach(kind STANDARD EXTENSION)
  if(NOT CMAKE_CUDA20_${kind}_COMPILE_OPTION)
    set(CMAKE_CUDA20_${kind}_COMPILE_OPTION -std=c++20)
  endif()
endforeach()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  if(CNLLAMA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "nvcc is ${CMAKE_CUDA_COMPILER_VERSION}, and 12.8 or later is needed")
  endif()
  message(STATUS "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.8: cnllama is built without CUDA")
  return()
endif()
find_package(CUDAToolkit QUIET)
if(NOT TARGET CUDA::cudart_static)
  if(CNLLAMA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CNLLAMA_CUDA is ON and the CUDA toolkit of ${CMAKE_CUDA_COMPILER} has no static run time "
      "(libcudart_static.a): install it, or set CNLLAMA_CUDA to AUTO")
  endif()
  message(STATUS "The CUDA toolkit has no static run time: cnllama is built without CUDA")
  return()
endif()

file(GLOB CNLLAMA_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
pybind11_add_module(_cuda NO_EXTRAS ${CNLLAMA_CUDA_SOURCES} csrc/model.cpp csrc/rope.cpp csrc/kv_cache.cpp
  csrc/bind_model.cpp csrc/fork.cpp)
target_include_directories(_cuda PRIVATE csrc)
target_link_libraries(_cuda PRIVATE CUDA::cudart_static Threads::Threads)
set_target_properties(_cuda PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden)
# As on the CPU the order of every float operation is part of the contract: no contraction.
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-O2 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wshadow>
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 --fmad=false --expt-relaxed-constexpr -Xfatbin=-compress-all>)
if(CNLLAMA_WERROR)
  target_compile_options(_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
install(TARGETS _cuda LIBRARY DESTINATION cnllama)
