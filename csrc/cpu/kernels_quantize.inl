// SPDX-License-Identifier: Apache-2.0
// The weight quantizer: 16 rows at a time, a row a lane. Included inside an anonymous namespace.
//
// For every group a few scales are tried. Each gives integers, these give the scale (and min) of least squares, some
// times in turn; that is rounded to fp16 and judged by the squared error that is left; the best one is kept. With
// kWeighted every square counts as much as its column's importance. Sums are plain multiplies and adds, because the
// scalar reference has no fast fused multiply-add and nothing here needs one.

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

/// x times the importance of column k.
template <bool kWeighted>
inline f32x16 weighted(const QuantizeGroup& g, int k, f32x16 x) {
    if constexpr (kWeighted)
        return mul(x, bcast(g.importance[k]));
    else
        return x;
}

/// The fit with the fp16 neighbours of (scale, min), its error measured. low and high bound the integers.
template <bool kWeighted>
inline Fit measured(const QuantizeGroup& g, f32x16 scale, f32x16 min_w, f32x16 low, f32x16 high) {
    Fit fit{rounded_half(scale), rounded_half(min_w), zeros()};
    const f32x16 inverse = inverse_or_zero(fit.scale);
    for (int k = 0; k < g.cols; ++k) {
        const f32x16 w = load(g.w + k * 16);
        const f32x16 q = clamp_round(mul(sub(w, fit.min), inverse), low, high);
        const f32x16 d = sub(add(mul(q, fit.scale), fit.min), w);
        fit.error = add(fit.error, weighted<kWeighted>(g, k, mul(d, d)));
    }
    return fit;
}

/// What is tried for one number of bits.
struct Trials {
    const float* values;
    int count, rounds;  // rounds of least squares
};

/// Where the extreme value is mapped to, as parts of the lowest integer's size (the scale takes its sign). Parts above
/// 1 clip it, which often leaves less error over the group. With 2 bits the highest integer may be nearer: parts below
/// 0.
template <bool kWeighted>
inline Trials symmetric_trials(int bits) {
    static constexpr float k2[] = {1.0f,  0.8f,  1.2f,  1.4f,  1.6f,  1.8f,  2.0f,  2.3f,
                                   -0.6f, -0.8f, -1.0f, -1.2f, -1.4f, -1.6f, -1.9f, -2.2f};
    static constexpr float k3[] = {1.0f, 0.85f, 0.92f, 1.06f, 1.13f, 1.2f, 1.28f, 1.37f, 1.47f, 1.6f, 1.75f, 1.95f};
    static constexpr float k4[] = {1.0f, 0.9f, 0.95f, 1.05f, 1.1f, 1.15f, 1.2f, 1.275f, 1.35f, 1.45f, 1.6f, 1.8f};
    static constexpr float k6[] = {1.0f, 0.97f, 0.985f, 1.015f, 1.03f, 1.06f, 1.1f, 1.14f, 1.2f, 1.28f, 1.4f, 1.6f};
    static constexpr float k8[] = {0.9921875f, 0.98828125f, 0.99609375f};  // 127, 126.5 and 127.5 of 128
    constexpr int kCount = kWeighted ? 12 : 9, kRounds = kWeighted ? 3 : 2;
    switch (bits) {
        case 2:
            return {k2, 16, kRounds};
        case 3:
            return {k3, 12, kRounds};
        case 4:
            return {k4, kCount, kWeighted ? 3 : 1};
        case 5:
            return {k4, kCount, kRounds};
        case 6:
            return {k6, kCount, kRounds};
        default:
            return {k8, 3, kWeighted ? 2 : 1};
    }
}

/// Pairs: a part of the range [lowest, highest], and how much of what is left lies below it.
template <bool kWeighted>
inline Trials asymmetric_trials(int bits) {
    static constexpr float kFew[] = {1.0f,  0.5f,  0.92f, 0.5f,  0.84f, 0.5f, 0.74f, 0.5f, 0.62f, 0.5f, 0.5f,  0.5f,
                                     0.84f, 0.15f, 0.84f, 0.85f, 0.7f,  0.2f, 0.7f,  0.8f, 0.55f, 0.3f, 0.55f, 0.7f};
    static constexpr float kMany[] = {1.0f,  0.5f, 0.97f, 0.5f,  0.93f, 0.5f,  0.88f, 0.5f,  0.82f, 0.5f,
                                      0.76f, 0.5f, 0.88f, 0.25f, 0.88f, 0.75f, 0.76f, 0.25f, 0.76f, 0.75f};
    if (bits < 4) return {kFew, 12, kWeighted ? 5 : 4};
    if (bits == 4 && !kWeighted) return {kMany, 6, 3};
    return {kMany, 10, 5};
}

template <bool kWeighted>
inline Fit fit_symmetric(const QuantizeGroup& g, f32x16 low, f32x16 high) {
    f32x16 extreme = zeros();
    for (int k = 0; k < g.cols; ++k) {
        const f32x16 w = load(g.w + k * 16);
        extreme = select_less(abs(extreme), abs(w), w, extreme);
    }
    const Trials trials = symmetric_trials<kWeighted>(g.bits);
    const float lowest = static_cast<float>(1 << (g.bits - 1));
    Fit best = no_fit();
    for (int i = 0; i < trials.count; ++i) {
        f32x16 step = div(extreme, bcast(-lowest * trials.values[i]));
        for (int round = 0; round < trials.rounds; ++round) {
            const f32x16 inverse = inverse_or_zero(step);
            f32x16 wq = zeros(), qq = zeros();
            for (int k = 0; k < g.cols; ++k) {
                const f32x16 w = load(g.w + k * 16);
                const f32x16 q = clamp_round(mul(w, inverse), low, high);
                wq = add(wq, weighted<kWeighted>(g, k, mul(w, q)));
                qq = add(qq, weighted<kWeighted>(g, k, mul(q, q)));
            }
            step = ratio_or(wq, qq, step);
        }
        keep_better(best, measured<kWeighted>(g, step, zeros(), low, high));
    }
    return best;
}

template <bool kWeighted>
inline Fit fit_asymmetric(const QuantizeGroup& g, f32x16 low, f32x16 high) {
    f32x16 lowest = load(g.w), highest = lowest;
    float total = 0.0f;
    for (int k = 0; k < g.cols; ++k) {
        lowest = min(lowest, load(g.w + k * 16));
        highest = max(highest, load(g.w + k * 16));
        if constexpr (kWeighted) total = total + g.importance[k];
    }
    const f32x16 range = sub(highest, lowest), n = bcast(kWeighted ? total : static_cast<float>(g.cols));
    const float top = static_cast<float>((1 << g.bits) - 1);
    const Trials trials = asymmetric_trials<kWeighted>(g.bits);
    Fit best = no_fit();
    keep_better(best, measured<kWeighted>(g, zeros(), mul(add(lowest, highest), bcast(0.5f)), low, high));  // one value
    for (int i = 0; i < trials.count; ++i) {
        const float part = trials.values[2 * i], below = trials.values[2 * i + 1];
        f32x16 scale = mul(range, bcast(part / top));
        f32x16 offset = mul(range, bcast((1.0f - part) * below));  // of the min above `lowest`
        for (int round = 0; round < trials.rounds; ++round) {
            const f32x16 inverse = inverse_or_zero(scale);
            f32x16 wq = zeros(), qq = zeros(), w1 = zeros(), q1 = zeros();
            for (int k = 0; k < g.cols; ++k) {
                const f32x16 w = sub(load(g.w + k * 16), lowest);
                const f32x16 q = clamp_round(mul(sub(w, offset), inverse), low, high);
                const f32x16 wu = weighted<kWeighted>(g, k, w), qu = weighted<kWeighted>(g, k, q);
                wq = add(wq, mul(wu, q));
                qq = add(qq, mul(qu, q));
                w1 = add(w1, wu);
                q1 = add(q1, qu);
            }
            const f32x16 spread = sub(mul(n, qq), mul(q1, q1));
            scale = ratio_or(sub(mul(n, wq), mul(w1, q1)), spread, scale);
            offset = div(sub(w1, mul(scale, q1)), n);
        }
        keep_better(best, measured<kWeighted>(g, scale, add(offset, lowest), low, high));
    }
    return best;
}

template <bool kWeighted>
inline void quantize_fit(const QuantizeGroup& g) {
    const int zero = g.asymmetric ? 0 : 1 << (g.bits - 1), top = (1 << g.bits) - 1;
    const f32x16 low = bcast(static_cast<float>(g.bits == 8 && !g.asymmetric ? -127 : -zero));
    const f32x16 high = bcast(static_cast<float>(top - zero));
    const Fit fit = g.asymmetric ? fit_asymmetric<kWeighted>(g, low, high) : fit_symmetric<kWeighted>(g, low, high);
    store_half(g.scale, fit.scale);
    if (g.asymmetric) store_half(g.min, fit.min);
    const f32x16 inverse = inverse_or_zero(fit.scale), start = bcast(static_cast<float>(zero));
    const f32x16 min_w = g.asymmetric ? fit.min : zeros();
    f32x16 error = zeros();
    for (int k = 0; k < g.cols; ++k) {
        const f32x16 w = load(g.w + k * 16);
        const f32x16 q = clamp_round(mul(sub(w, min_w), inverse), low, high);
        const f32x16 d = sub(add(mul(q, fit.scale), min_w), w);
        error = add(error, mul(d, d));
        store_uint8(g.q + k * 16, add(q, start));
    }
    store(g.error, error);
}

inline void quantize_group(const QuantizeGroup& g) {
    if (g.importance)
        quantize_fit<true>(g);
    else
        quantize_fit<false>(g);
}
