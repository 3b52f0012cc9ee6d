// SPDX-License-Identifier: Apache-2.0
// Norms, quantization of activations, gathering of rows, unpacking of embeddings: the order of operations is that of
// csrc/cpu/kernels_float.inl, so the results have the same bits.
#include "kernels.hpp"
#include "ptx.cuh"

namespace cnl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStaged = 8192;  // floats of a token in shared memory at a time

/// Eight values of one token, columns 8 lane .. 8 lane + 7 of a span, to int8, sums and scale. All lanes of a warp.
__device__ __forceinline__ void quantize_span(const float (&y)[8], int span, int cols, int token, const Act& out) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, tiles = static_cast<int>(col_tiles(cols));
    float largest = 0.0f, poison = 0.0f;
    for (int i = 0; i < 8; ++i) {
        const float a = fabsf(y[i]);
        largest = largest > a ? largest : a;
        poison = fmaf(y[i], 0.0f, poison);  // 0, or NaN once a value is NaN or infinite: the scale must say so
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = shuffle_xor(largest, mask);
        largest = largest > other ? largest : other;
        poison = poison + shuffle_xor(poison, mask);
    }
    const bool usable = largest > 0.0f;
    const float inverse = usable ? 127.0f / largest : 0.0f;

    // A lane's columns are 8 (lane % 4) of the half lane / 4 % 2 of tile lane / 8: two neighbouring words.
    std::uint32_t words[2] = {0, 0};
    std::int32_t sum = 0;
    for (int i = 0; i < 8; ++i) {
        float v = y[i] * inverse;
        v = v < 127.0f ? v : 127.0f;
        v = v > -127.0f ? v : -127.0f;
        const int q = __float2int_rn(v);
        sum += q;
        words[i / 4] |= static_cast<std::uint32_t>(q & 255) << 8 * swap_middle(i % 4);
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const std::int32_t both = sum + shuffle_xor(sum, 4);
    const int tile = span * kSpanTiles + lane / 8, half = lane / 4 % 2, block = token / kTokenBlock,
              slot = token % kTokenBlock;
    const std::int64_t at = static_cast<std::int64_t>(block) * tiles + tile;
    std::int8_t* values = out.values + (at * kTokenBlock + slot) * kTileCols + lane % 4 * 16 + half * 8;
    *reinterpret_cast<uint2*>(values) = make_uint2(words[0], words[1]);
    std::int32_t* sums = out.sums + at * kSumKinds * kTokenBlock + slot;
    if (lane % 4 == 0) sums[half * kTokenBlock] = sum;
    if (lane % 8 == 0) {
        sums[2 * kTokenBlock] = both;
        sums[3 * kTokenBlock] = as_int(static_cast<float>(both));
    }
    if (lane == 0)
        out.scales[(static_cast<std::int64_t>(block) * spans(cols) + span) * kTokenBlock + slot] =
            (usable ? largest / 127.0f : 0.0f) + poison;
}

__device__ __forceinline__ void load_span(const float* x, int span, int cols, float (&y)[8]) {
    const int first = span * kSpan + static_cast<int>(threadIdx.x) % kWarp * 8;
    for (int i = 0; i < 8; ++i) y[i] = first + i < cols ? x[first + i] : 0.0f;
}

/// A warp a span of a token.
__global__ void __launch_bounds__(kThreads) quantize_kernel(const float* x, int tokens, int cols, Act out) {
    wait_for_previous();
    const int count = static_cast<int>(spans(cols));
    const std::int64_t task = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    if (task >= static_cast<std::int64_t>(tokens) * count) return;
    const int token = static_cast<int>(task / count), span = static_cast<int>(task % count);
    float y[8];
    load_span(x + static_cast<std::int64_t>(token) * cols, span, cols, y);
    quantize_span(y, span, cols, token, out);
}

/// A block a token. The sum of squares goes over 16 lanes, each in order, so only 16 threads can take part in it: the
/// others bring the values into shared memory, where a step of the chain costs no more than its addition.
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const float* x, const float* gamma, float eps, int cols, Act out) {
    __shared__ float staged[kStaged];
    __shared__ float shared_factor;
    const int token = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    wait_for_previous();
    const float* row = x + static_cast<std::int64_t>(token) * cols;
    float sum = 0.0f;
    for (int begin = 0; begin < cols; begin += kStaged) {
        const int count = cols - begin < kStaged ? cols - begin : kStaged;
        __syncthreads();
        for (int i = thread; i < (count + 15) / 16 * 16; i += kThreads) staged[i] = i < count ? row[begin + i] : 0.0f;
        __syncthreads();
        if (thread < 16)
            for (int i = thread; i < count; i += 16) sum = fmaf(staged[i], staged[i], sum);
    }
    if (thread < kWarp) {
        for (int mask = 8; mask > 0; mask /= 2) sum = sum + shuffle_xor(sum, mask);
        if (thread == 0) shared_factor = 1.0f / sqrtf(sum / static_cast<float>(cols) + eps);
    }
    __syncthreads();
    const float factor = shared_factor;
    const int count = static_cast<int>(spans(cols));
    for (int span = thread / kWarp; span < count; span += kWarps) {
        float y[8], g[8];
        load_span(cols <= kStaged ? staged : row, span, cols, y);
        load_span(gamma, span, cols, g);
        for (int i = 0; i < 8; ++i) y[i] = y[i] * factor * g[i];
        quantize_span(y, span, cols, token, out);
    }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const float* x, StepRows step, int cols, float* out) {
    wait_for_previous();
    const std::int64_t from = step.at(blockIdx.y).output;
    const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i < cols) out[static_cast<std::int64_t>(blockIdx.y) * cols + i] = x[from * cols + i];
}

/// x[token][col] of the tile that holds it: w = scale (q - zero) or scale q + min, as the CPU's dequantize_row.
template <int kScheme>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(Tiles table, StepRows step, const std::int32_t* chosen, float* x) {
    using S = SchemeOf<kScheme>;
    wait_for_previous();
    const int col = static_cast<int>(blockIdx.x * kThreads + threadIdx.x), i = static_cast<int>(blockIdx.y);
    if (col >= table.cols) return;
    const std::int32_t given = step.at(i).token, token = given >= 0 ? given : chosen[i];
    const std::int64_t id = token >= 0 && token < table.rows ? token : 0;
    const int tiles = static_cast<int>(col_tiles(table.cols));
    const std::int64_t tile = id / kTileRows * tiles + col / kTileCols;
    const int row = static_cast<int>(id % kTileRows), g = row % 8, high = row / 8, in = col % kTileCols;
    const int half = in / 32, lane = 4 * g + in % 32 / 8, s = in % 8 / 4, b = swap_middle(in % 4);
    const std::uint8_t* values = table.data + tile * S::kTileBytes;
    int q = S::kBits == 4 ? values[lane * 16 + half * 8 + s * 4 + b] >> 4 * high & 15
                          : values[half * 512 + lane * 16 + (2 * s + high) * 4 + b];
    const auto* params = reinterpret_cast<const std::uint16_t*>(
        table.data + static_cast<std::int64_t>(table.pairs()) * 2 * tiles * S::kTileBytes + tile * S::kParamBytes);
    const std::uint16_t* own = params + g * 2 * S::kParams + high * S::kParams;
    const float scale = half_to_float(own[S::kGroup == 32 ? half : 0]);
    float w = scale * static_cast<float>(q - S::kZero);
    if constexpr (S::kAsymmetric) w = fmaf(scale, static_cast<float>(q), half_to_float(own[1]));
    x[static_cast<std::int64_t>(i) * table.cols + col] = w;
}

unsigned blocks(std::int64_t count, int each) { return static_cast<unsigned>((count + each - 1) / each); }

}  // namespace

void norm_quantize(const Queue& queue, const float* x, const float* gamma, float eps, int tokens, int cols,
                   const Act& out) {
    if (gamma)
        launch(queue, "rms_norm", norm_kernel, {dim3(static_cast<unsigned>(tokens)), dim3(kThreads)}, x, gamma, eps,
               cols, out);
    else
        launch(queue, "quantize", quantize_kernel, {dim3(blocks(tokens * spans(cols), kWarps)), dim3(kThreads)}, x,
               tokens, cols, out);
}

void gather_rows(const Queue& queue, const float* x, const StepRows& step, int count, int cols, float* out) {
    launch(queue, "gather_rows", gather_kernel,
           {dim3(blocks(cols, kThreads), static_cast<unsigned>(count)), dim3(kThreads)}, x, step, cols, out);
}

void embed(const Queue& queue, const Tiles& table, const StepRows& step, const std::int32_t* chosen, int tokens,
           float* x) {
    constexpr void (*kKernels[kSchemeCount])(Tiles, StepRows, const std::int32_t*, float*) = {
        embed_kernel<0>, embed_kernel<1>, embed_kernel<2>, embed_kernel<3>};
    static_assert(is_complete(kKernels));
    launch(queue, "embed", kKernels[table.scheme],
           {dim3(blocks(table.cols, kThreads), static_cast<unsigned>(tokens)), dim3(kThreads)}, table, step, chosen, x);
}

}  // namespace cnl::cuda
