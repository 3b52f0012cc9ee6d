// SPDX-License-Identifier: Apache-2.0
// The weight quantizer: 16 rows at a time, a row a lane. Included inside an anonymous namespace.
//
// For every group a few scales are tried. Each gives integers, these give the scale (and min) of least squares, which
// is rounded to fp16 and judged by the squared error that is left; the best one is kept. Sums are plain multiplies and
// adds, because the scalar reference has no fast fused multiply-add and nothing here needs one.

struct Fit {
    f32x16 scale, min, error;
};

/// What is left where every scale tried is beyond fp16: an infinite one, which the caller refuses.
inline Fit no_fit() {
    const f32x16 infinity = bcast(__builtin_inff());
    return {infinity, infinity, infinity};
}

inline f32x16 rounded_half(f32x16 x) {
    std::uint16_t halves[16];
    store_half(halves, x);
    return load_half(halves);
}
inline f32x16 clamp_round(f32x16 x, f32x16 low, f32x16 high) { return round_even(max(min(x, high), low)); }
/// 1 / x, and 0 for 0.
inline f32x16 inverse_or_zero(f32x16 x) { return select_less(zeros(), abs(x), div(bcast(1.0f), x), zeros()); }
/// n / d where d > 0, else `otherwise`.
inline f32x16 ratio_or(f32x16 n, f32x16 d, f32x16 otherwise) { return select_less(zeros(), d, div(n, d), otherwise); }
inline void keep_better(Fit& best, const Fit& fit) {
    const f32x16 error = best.error;
    best.scale = select_less(fit.error, error, fit.scale, best.scale);
    best.min = select_less(fit.error, error, fit.min, best.min);
    best.error = select_less(fit.error, error, fit.error, error);
}

/// The fit with the fp16 neighbours of (scale, min), its error measured. low and high bound the integers.
inline Fit measured(const QuantizeGroup& g, f32x16 scale, f32x16 min_w, f32x16 low, f32x16 high) {
    Fit fit{rounded_half(scale), rounded_half(min_w), zeros()};
    const f32x16 inverse = inverse_or_zero(fit.scale);
    for (int k = 0; k < g.cols; ++k) {
        const f32x16 w = load(g.w + k * 16);
        const f32x16 q = clamp_round(mul(sub(w, fit.min), inverse), low, high);
        const f32x16 d = sub(add(mul(q, fit.scale), fit.min), w);
        fit.error = add(fit.error, mul(d, d));
    }
    return fit;
}

inline Fit fit_symmetric(const QuantizeGroup& g, f32x16 low, f32x16 high) {
    // Divisors of the extreme value. 4 bits: -8 maps to it (the scale takes its sign), and smaller steps that clip it
    // often leave less error over the group.
    static constexpr float kDivisors4[] = {8.0f, 7.2f, 7.6f, 8.4f, 8.8f, 9.2f, 9.6f, 10.2f, 10.8f};
    static constexpr float kDivisors8[] = {127.0f, 126.5f, 127.5f};
    f32x16 extreme = zeros();
    for (int k = 0; k < g.cols; ++k) {
        const f32x16 w = load(g.w + k * 16);
        extreme = select_less(abs(extreme), abs(w), w, extreme);
    }
    const float* divisors = g.bits == 4 ? kDivisors4 : kDivisors8;
    const int count = g.bits == 4 ? 9 : 3;
    Fit best = no_fit();
    for (int i = 0; i < count; ++i) {
        const f32x16 step = div(extreme, bcast(-divisors[i]));
        const f32x16 inverse = inverse_or_zero(step);
        f32x16 wq = zeros(), qq = zeros();
        for (int k = 0; k < g.cols; ++k) {
            const f32x16 w = load(g.w + k * 16);
            const f32x16 q = clamp_round(mul(w, inverse), low, high);
            wq = add(wq, mul(w, q));
            qq = add(qq, mul(q, q));
        }
        keep_better(best, measured(g, ratio_or(wq, qq, step), zeros(), low, high));
    }
    return best;
}

inline Fit fit_asymmetric(const QuantizeGroup& g, f32x16 low, f32x16 high) {
    static constexpr float kRanges[] = {1.0f, 0.97f, 0.93f, 0.88f, 0.82f, 0.76f};  // of [lowest, highest], centred
    f32x16 lowest = load(g.w), highest = lowest;
    for (int k = 1; k < g.cols; ++k) {
        lowest = min(lowest, load(g.w + k * 16));
        highest = max(highest, load(g.w + k * 16));
    }
    const f32x16 range = sub(highest, lowest), n = bcast(static_cast<float>(g.cols));
    Fit best = no_fit();
    keep_better(best, measured(g, zeros(), mul(add(lowest, highest), bcast(0.5f)), low, high));  // one value only
    for (const float part : kRanges) {
        f32x16 scale = mul(range, bcast(part / 15.0f));
        f32x16 offset = mul(range, bcast((1.0f - part) * 0.5f));  // of the min above `lowest`
        for (int round = 0; round < 3; ++round) {
            const f32x16 inverse = inverse_or_zero(scale);
            f32x16 wq = zeros(), qq = zeros(), w1 = zeros(), q1 = zeros();
            for (int k = 0; k < g.cols; ++k) {
                const f32x16 w = sub(load(g.w + k * 16), lowest);
                const f32x16 q = clamp_round(mul(sub(w, offset), inverse), low, high);
                wq = add(wq, mul(w, q));
                qq = add(qq, mul(q, q));
                w1 = add(w1, w);
                q1 = add(q1, q);
            }
            const f32x16 spread = sub(mul(n, qq), mul(q1, q1));
            scale = ratio_or(sub(mul(n, wq), mul(w1, q1)), spread, scale);
            offset = div(sub(w1, mul(scale, q1)), n);
        }
        keep_better(best, measured(g, scale, add(offset, lowest), low, high));
    }
    return best;
}

inline void quantize_group(const QuantizeGroup& g) {
    const bool four = g.bits == 4;
    const int zero = g.asymmetric ? 0 : four ? 8 : 128;
    const f32x16 low = bcast(g.asymmetric ? 0.0f : four ? -8.0f : -127.0f);
    const f32x16 high = bcast(g.asymmetric ? 15.0f : four ? 7.0f : 127.0f);
    const Fit fit = g.asymmetric ? fit_asymmetric(g, low, high) : fit_symmetric(g, low, high);
    store_half(g.scale, fit.scale);
    if (g.asymmetric) store_half(g.min, fit.min);
    store(g.error, fit.error);
    const f32x16 inverse = inverse_or_zero(fit.scale), start = bcast(static_cast<float>(zero));
    const f32x16 min_w = g.asymmetric ? fit.min : zeros();
    for (int k = 0; k < g.cols; ++k) {
        const f32x16 q = clamp_round(mul(sub(load(g.w + k * 16), min_w), inverse), low, high);
        store_uint8(g.q + k * 16, add(q, start));
    }
}
