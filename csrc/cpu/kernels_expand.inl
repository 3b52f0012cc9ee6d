// SPDX-License-Identifier: Apache-2.0
// Weights of schemes without matmul kernels of their own, to bytes that the 8-bit kernels multiply. Included inside an
// anonymous namespace.
//
// Planes of bits lie so that a line is taken apart by one shift and one mask for all of its 64 bytes (layout.hpp).

/// Shifts are of 32-bit words, whose bits that cross over a byte the masks take away.
typedef std::uint32_t ExpandLine __attribute__((vector_size(64), may_alias));

template <int kLow, int kHigh>
inline void expand_block(const ExpandLine* in, ExpandLine* out, std::uint32_t offset, std::int64_t ahead) {
    constexpr std::uint32_t kLowMask = 0x01010101u * ((1u << kLow) - 1), kHighMask = 0x01010101u * ((1u << kHigh) - 1);
#pragma GCC unroll 8
    for (int line = 0; line < kLow + kHigh; ++line) prefetch(reinterpret_cast<const std::uint8_t*>(in + line) + ahead);
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; ++quad) {
        ExpandLine q = in[quad & (kLow - 1)] >> (quad & -kLow) & kLowMask;
        if constexpr (kHigh > 0) q |= (in[kLow + (quad & (kHigh - 1))] >> (quad & -kHigh) & kHighMask) << kLow;
        out[quad] = q + offset;
    }
}

template <int kLow, int kHigh>
inline void expand_blocks(const ExpandSuperblock& s) {
    const auto* in = reinterpret_cast<const ExpandLine*>(s.from + s.from_header);
    auto* out = reinterpret_cast<ExpandLine*>(s.to + s.to_header);
    const std::uint32_t offset = 0x01010101u * static_cast<std::uint32_t>(s.offset);
    for (int b = 0; b < s.blocks; ++b, in += kLow + kHigh, out += 8)
        expand_block<kLow, kHigh>(in, out, offset, s.ahead);
}

inline void expand(const ExpandSuperblock& s) {
    const int kinds = s.asymmetric ? 2 : 1;
    for (int kind = 0; kind < kinds; ++kind)
        for (int g = 0; g < s.to_groups; ++g)
            __builtin_memcpy(s.to + (kind * s.to_groups + g) * 32, s.from + (kind * s.from_groups + g / s.repeat) * 32,
                             32);
    switch (s.bits) {
        case 2:
            return expand_blocks<2, 0>(s);
        case 3:
            return expand_blocks<2, 1>(s);
        case 5:
            return expand_blocks<4, 1>(s);
        default:
            return expand_blocks<4, 2>(s);
    }
}
