// SPDX-License-Identifier: Apache-2.0
// All micro-kernels of one instruction set, and its table. An isa_*.cpp includes this inside an anonymous namespace,
// after its vec_*.hpp.

#include "kernels_float.inl"
// after exp_f32 and zeros
#include "kernels_attention.inl"
#include "kernels_matmul.inl"
#include "kernels_quantize.inl"

#define CNL_TILES(scheme, panels)                                                                                    \
    {                                                                                                                \
        matmul_tile<scheme, panels, 1>, matmul_tile<scheme, panels, 2>, matmul_tile<scheme, panels, 3>,              \
            matmul_tile<scheme, panels, 4>, matmul_tile<scheme, panels, 5>, matmul_tile<scheme, panels, 6>           \
    }
#define CNL_SCHEME(scheme) {CNL_TILES(scheme, 1), CNL_TILES(scheme, 2)}

inline std::uint64_t read_lines(const std::uint8_t* lines, std::int64_t count) {
    f32x16 sum[4] = {zeros(), zeros(), zeros(), zeros()};
    for (std::int64_t i = 0; i < count; ++i) {
        float line[16];
        __builtin_memcpy(line, lines + i * 64, 64);
        sum[i % 4] = max(sum[i % 4], load(line));
    }
    float lanes[16];
    store(lanes, max(max(sum[0], sum[1]), max(sum[2], sum[3])));
    std::uint32_t bits;
    __builtin_memcpy(&bits, lanes, 4);
    return bits;
}

constexpr Kernels make_table(const char* name) {
    return {name,
            {CNL_SCHEME(0), CNL_SCHEME(1), CNL_SCHEME(2), CNL_SCHEME(3)},
            rms_factor,
            quantize_span,
            swiglu,
            exp_row,
            rope,
            kv_store,
            attention_chunk,
            attention_merge,
            attention_finish,
            quantize_group,
            int8_peak,
            read_lines};
}

#undef CNL_SCHEME
#undef CNL_TILES
