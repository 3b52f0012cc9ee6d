// SPDX-License-Identifier: Apache-2.0
// Every op of the forward pass, once, with its contract. csrc/cpu defines them for _core; csrc/cuda defines the same
// names in the same order for _cuda.
//
// Rules for all of them
//  * All threads of the team call the op with the same arguments; when it returns, its result is readable by all.
//  * Matrices are row-major, one token a row; m = number of tokens, >= 1. No argument aliases another unless said.
//  * The bits of a token's result depend on nothing but that token's inputs: not on m, the number of threads, the
//    instruction set, or where a prompt was cut into chunks. Sums run in a fixed order with explicit fused
//    multiply-adds, so every back end of one family gives the same bits.
//  * Sizes were checked when the model was built; ops do not check them again and do not throw.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "kv_cache.hpp"
#include "layout.hpp"
#include "threads.hpp"

namespace cnl {

/// A packed matrix [rows, cols], padded as layout.hpp says. `data` is 64-byte aligned and outlives the model.
struct Weight {
    const layout::Scheme* scheme = nullptr;
    std::int64_t rows = 0, cols = 0;
    const std::uint8_t* data = nullptr;
};

/// m consecutive tokens of one sequence in a step. Rows row .. row + count - 1 of the step's matrices are positions
/// start .. start + count - 1 of the sequence, whose cache already has room for them.
struct SequenceRows {
    std::int64_t row = 0, count = 0, start = 0;
    const std::int32_t* pages = nullptr;
};

namespace ops {

/// What the host prepares for a step, in its own memory; the rest of an op's arguments is the back end's (memory.hpp).
struct StepInputs {
    std::span<const std::int32_t> tokens, output_rows;  // of embed and gather_rows
    std::span<const SequenceRows> sequences;
    const float *cos = nullptr, *sin = nullptr;  // [m, head_dim / 2]
};

/// Runs a step: `forward` on every thread of the pool, with ops whose host arguments are those of `inputs`. A back end
/// with a memory of its own sends them there first. Its results may still be on their way when it returns.
void run_step(ThreadPool& pool, const StepInputs& inputs, const std::function<void(Team&)>& forward);

/// Int8 activations in the order the matmul kernels read them: opaque to the model. One scale per token and 256
/// columns, and the sums per group that fold the weights' offsets away. Room for `max_tokens` x `max_cols` is taken
/// once, and for a copy of few tokens for each of `threads` threads: with it rms_norm and quantize need no barrier
/// then.
class Activations {
 public:
    Activations(std::int64_t max_tokens, std::int64_t max_cols, int threads = 0);
    ~Activations();
    Activations(const Activations&) = delete;
    Activations& operator=(const Activations&) = delete;
    struct Data;
    Data& data() { return *data_; }
    const Data& data() const { return *data_; }

 private:
    Data* data_;
};

/// x[i] = table[tokens[i]], dequantized. tokens in [0, table.rows); x float [m, cols].
void embed(Team&, const Weight& table, const std::int32_t* tokens, std::int64_t m, float* x);

/// out = quantize(x / sqrt(mean(x^2) + eps) * gamma). x float [m, cols], gamma float [cols].
void rms_norm(Team&, const float* x, const float* gamma, float eps, std::int64_t m, std::int64_t cols,
              Activations& out);

/// out = quantize(x): int8, round to nearest even, scale = max|x| / 127 over 256 columns. x float [m, cols].
void quantize(Team&, const float* x, std::int64_t m, std::int64_t cols, Activations& out);

/// One matrix of a matmul and where its result goes: out[i * stride + r] for token i and row r. bias may be null.
struct Projection {
    const Weight* weight;
    const float* bias;
    float* out;
    std::int64_t stride;
};

/// out_j = W_j x + bias_j for every projection; all have the columns that x was quantized with. m = x's tokens.
void matmul(Team&, const Activations& x, std::span<const Projection> projections);

/// x[i] += W a_i + bias, the residual connection. x float [m, w.rows]; bias may be null.
void matmul_add(Team&, const Activations& a, const Weight& w, const float* bias, float* x);

/// h = silu(gate a + gate_bias) * (up a + up_bias): silu(z) = z / (1 + exp(-z)). h float [m, gate.rows]. Biases may be
/// null. out, which may be null, becomes quantize(h) without a pass or a barrier of its own.
void matmul_swiglu(Team&, const Activations& a, const Weight& gate, const float* gate_bias, const Weight& up,
                   const float* up_bias, float* h, Activations* out);

/// Rotates q and k in place (rotate-half pairs (j, j + d/2), as Hugging Face stores LLaMA) and writes k and v into the
/// cache of `layer`. cos, sin float [m, head_dim / 2], already scaled. q float [m, heads * head_dim],
/// k, v float [m, kv_heads * head_dim]; int8 pages take one scale per position and head, max|x| / 127.
void rope_append(Team&, float* q, float* k, const float* v, const float* cos, const float* sin, int heads,
                 std::span<const SequenceRows> sequences, const KvCache& cache, int layer);

/// What attention rotates and appends before it begins: the arguments of rope_append.
struct NewKeys {
    float* k;
    const float *v, *cos, *sin;
};

/// Causal attention of every row over positions 0 .. its own of its sequence, softmax(q k / sqrt(head_dim)) v.
/// q, attended float [m, heads * head_dim]; heads is a multiple of the cache's kv_heads, and query head h reads kv head
/// h / (heads / kv_heads). Keys are taken in fixed chunks that are merged in order, which keeps the bits independent
/// of the split. With `fresh` (else null) it is rope_append first, and q and k are left rotated or not; where a
/// sequence has few rows that costs no barrier. out, which may be null, becomes quantize(attended).
void attention(Team&, float* q, int heads, const NewKeys* fresh, std::span<const SequenceRows> sequences,
               const KvCache& cache, int layer, float* attended, Activations* out);

/// out[i] = x[rows[i]]. x float [*, cols], out float [count, cols].
void gather_rows(Team&, const float* x, const std::int32_t* rows, std::int64_t count, std::int64_t cols, float* out);

}  // namespace ops
}  // namespace cnl
