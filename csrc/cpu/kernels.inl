// SPDX-License-Identifier: Apache-2.0
// All micro-kernels of one instruction set, and its table. An isa_*.cpp includes this inside an anonymous namespace,
// after its vec_*.hpp.

#include "kernels_float.inl"
// after the functions above
#include "kernels_attention.inl"
#include "kernels_expand.inl"
#include "kernels_matmul.inl"
#include "kernels_quantize.inl"

#define CNL_TO_6(kernel, shape) \
    kernel<shape, 1>, kernel<shape, 2>, kernel<shape, 3>, kernel<shape, 4>, kernel<shape, 5>, kernel<shape, 6>
#define CNL_TO_12(kernel, shape)                                                                      \
    CNL_TO_6(kernel, shape), kernel<shape, 7>, kernel<shape, 8>, kernel<shape, 9>, kernel<shape, 10>, \
        kernel<shape, 11>, kernel<shape, 12>
#define CNL_SHAPES(list, kernel)                                                                       \
    {                                                                                                  \
        {list(kernel, 0)}, {list(kernel, 1)}, {list(kernel, 2)}, {list(kernel, 3)}, {list(kernel, 4)}, \
            {list(kernel, 5)}, {list(kernel, 6)}, {list(kernel, 7)}, {                                 \
            list(kernel, 8)                                                                            \
        }                                                                                              \
    }

inline std::uint64_t read_lines(const std::uint8_t* lines, std::int64_t count) {
    typedef std::uint64_t Words __attribute__((vector_size(32), may_alias));
    const Words* p = reinterpret_cast<const Words*>(lines);
    Words a{}, b{}, c{}, d{};
    for (std::int64_t i = 0; i + 2 <= count; i += 2, p += 4) {
        a += p[0];
        b += p[1];
        c += p[2];
        d += p[3];
    }
    a += b + c + d;
    return a[0] + a[1] + a[2] + a[3];
}

constexpr Kernels make_table(const char* name) {
    return {name,
            CNL_SHAPES(CNL_TO_12, stream_panel),
            CNL_SHAPES(CNL_TO_6, pair),
            expand,
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
            float_peak,
            read_lines};
}

/// An array that is longer than the list that fills it ends in nulls, of which no compiler warns.
constexpr bool is_complete(const Kernels& k) {
    for (int shape = 0; shape < kShapeCount; ++shape) {
        for (int tokens = 0; tokens < kStreamTokens; ++tokens)
            if (k.stream_panel[shape][tokens] == nullptr) return false;
        for (int tokens = 0; tokens < kTileTokens; ++tokens)
            if (k.pair[shape][tokens] == nullptr) return false;
    }
    return k.expand && k.rms_factor && k.quantize_span && k.swiglu && k.exp && k.rope && k.kv_store &&
           k.attention_chunk && k.attention_merge && k.attention_finish && k.quantize_group && k.int8_peak &&
           k.float_peak && k.read_lines;
}
static_assert(is_complete(make_table("")), "a kernel is missing in the table of this instruction set");

#undef CNL_SHAPES
#undef CNL_TO_12
#undef CNL_TO_6
