// SPDX-License-Identifier: Apache-2.0
// All micro-kernels of one instruction set, and its table. An isa_*.cpp includes this inside an anonymous namespace,
// after its vec_*.hpp.

#include "kernels_float.inl"
// after the functions above
#include "kernels_attention.inl"
#include "kernels_expand.inl"
#include "kernels_matmul.inl"
#include "kernels_quantize.inl"

/// 0, 1, .. kCount - 1 as Numbers.
template <int... kEach>
struct Numbers {};
template <int kCount, int... kRest>
struct Up : Up<kCount - 1, kCount - 1, kRest...> {};
template <int... kEach>
struct Up<0, kEach...> {
    using To = Numbers<kEach...>;
};

/// As a matmul of one token reads: whole vectors, every line asked for as far ahead.
inline std::uint64_t read_lines(const std::uint8_t* lines, std::int64_t count, std::int64_t ahead) {
    typedef std::uint64_t Words __attribute__((vector_size(64), may_alias));
    Words a{}, b{};
    for (std::int64_t i = 0; i + 2 <= count; i += 2, lines += 128) {
        prefetch(lines + ahead);
        prefetch(lines + ahead + 64);
        a += reinterpret_cast<const Words*>(lines)[0];
        b += reinterpret_cast<const Words*>(lines)[1];
    }
    a += b;
    return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

template <int kShape, int... kFew, int... kSome>
constexpr void add_shape(Kernels& table, Numbers<kFew...>, Numbers<kSome...>) {
    ((table.pair[kShape][kFew] = pair<kShape, kFew + 1>), ...);
    ((table.stream_panel[kShape][kSome] = stream_panel<kShape, kSome + 1>), ...);
}

/// A kernel for every shape and number of tokens that the table has room for: none can be forgotten.
template <int... kShape>
constexpr void add_shapes(Kernels& table, Numbers<kShape...>) {
    (add_shape<kShape>(table, Up<kTileTokens>::To(), Up<kStreamTokens>::To()), ...);
}

#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wmissing-field-initializers"  // of the others none, either

constexpr Kernels make_table(const char* name) {
    Kernels table = {
        name,           {},        {},         expand,    rms_factor,      quantize_span,   whole_sum,
        swiglu,         exp_row,   rope,       kv_store,  attention_chunk, attention_merge, attention_finish,
        quantize_group, int8_peak, float_peak, read_lines};
    add_shapes(table, Up<kShapeCount>::To());
    return table;
}

#pragma GCC diagnostic pop
