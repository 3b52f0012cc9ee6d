// SPDX-License-Identifier: Apache-2.0
// A model's tensors on their way to the device: through two small pinned buffers, repacked on arrival.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "../ops.hpp"
#include "check.hpp"
#include "context.hpp"

namespace cnl::cuda {

/// "a, b and c": the weight schemes that have kernels.
std::string scheme_list();

class DeviceWeights {
 public:
    /// Room for `bytes` of tensors (device_bytes of each).
    DeviceWeights(const Context& context, std::size_t bytes);

    static std::size_t device_bytes(const Weight& weight);
    static std::size_t device_bytes(std::int64_t floats);

    /// The same matrix, or vector, in tiles on the device. What was uploaded before is not uploaded again.
    Weight upload(const Weight& weight);
    const float* upload(const float* vector, std::int64_t size);
    /// Returns when all of it has arrived.
    void finish();
    std::size_t bytes() const { return arena_.bytes(); }

 private:
    struct Piece {
        PinnedBytes host;
        DeviceArray<std::uint8_t> device;
        Event done;
        bool used = false;
    };
    std::uint8_t* take(std::size_t bytes);
    Piece& next_piece(std::size_t bytes);

    const Context& context_;
    DeviceArray<std::uint8_t> arena_;
    std::size_t used_ = 0;
    Piece pieces_[2];
    int next_ = 0;
    std::map<const void*, std::uint8_t*> known_;
};

}  // namespace cnl::cuda
