// SPDX-License-Identifier: Apache-2.0
// The ops of ops.hpp on the GPU, in their order. Float matrices and weights are device memory; tokens, positions and
// page tables were sent before the step began (Context::run), so those arguments are not read here.
#include <stdexcept>

#include "../memory.hpp"
#include "../ops.hpp"
#include "context.hpp"

namespace cnl {

// ---- one "thread" that launches kernels

struct ThreadPool::State {
    cuda::Context context{cuda::usable_device(), cuda::options_from_environment()};
};

ThreadPool::ThreadPool(int) : state_(std::make_unique<State>()) {}
ThreadPool::~ThreadPool() = default;
int ThreadPool::size() const { return 1; }
std::int64_t ThreadPool::barriers() const { return 0; }
int Team::size() const { return 1; }
void Team::barrier() {}
void ThreadPool::run(const std::function<void(Team&)>& job) {
    Team team(*this, 0);
    job(team);
}

/// The way from a pool to what is behind it.
struct DeviceAccess {
    static cuda::Context& context(ThreadPool& pool) { return pool.state_->context; }
};
cuda::Context& cuda::context_of(ThreadPool& pool) { return DeviceAccess::context(pool); }

// ---- memory

void* memory::reserve(std::size_t bytes) {
    void* p = cuda::take_device_memory(bytes, "the engine");
    cuda::fill_device_memory(p, 0, bytes, "clearing memory");
    return p;
}
void memory::release(void* p, std::size_t) noexcept { cuda::release_device_memory(p); }

namespace ops {

struct Activations::Data {
    cuda::DeviceArray<std::int8_t> values;
    cuda::DeviceArray<std::int32_t> sums;
    cuda::DeviceArray<float> scales;
    std::int64_t m = 0, cols = 0;

    cuda::Act act() const { return {values.get(), sums.get(), scales.get()}; }
};

namespace {

using cuda::Context, cuda::Epilogue, cuda::MatmulArgs, cuda::Tiles;

Tiles tiles_of(const Weight& w) {
    return {cuda::scheme_number(w.scheme->name), static_cast<int>(w.rows), static_cast<int>(w.cols), w.data};
}

MatmulArgs args_for(const Activations& x) {
    MatmulArgs args;
    args.act = x.data().act();
    args.tokens = Context::current().padded(x.data().m);
    args.cols = static_cast<int>(x.data().cols);
    return args;
}

void run(const MatmulArgs& args, Epilogue epilogue) {
    const Context& context = Context::current();
    if (context.options().dp4a && args.tokens == 1)
        cuda::matmul_dp4a(context.queue(), args, epilogue);
    else
        cuda::matmul(context.queue(), args, epilogue);
}

void quantize_into(const float* x, const float* gamma, float eps, std::int64_t m, std::int64_t cols, Activations& out) {
    const Context& context = Context::current();
    out.data().m = m;
    out.data().cols = cols;
    cuda::norm_quantize(context.queue(), x, gamma, eps, context.padded(m), static_cast<int>(cols), out.data().act());
}

}  // namespace

Activations::Activations(std::int64_t max_tokens, std::int64_t max_cols, int) : data_(new Data) {
    const auto blocks = static_cast<std::size_t>(cuda::token_blocks(max_tokens));
    const auto tiles = static_cast<std::size_t>(cuda::col_tiles(max_cols));
    data_->values = {blocks * tiles * cuda::kTokenBlock * cuda::kTileCols, "activations"};
    data_->sums = {blocks * tiles * cuda::kSumKinds * cuda::kTokenBlock, "activations"};
    data_->scales = {blocks * static_cast<std::size_t>(cuda::spans(max_cols)) * cuda::kTokenBlock, "activations"};
    cuda::fill_device_memory(data_->values.get(), 0, data_->values.bytes(), "clearing memory");
    cuda::fill_device_memory(data_->sums.get(), 0, data_->sums.bytes(), "clearing memory");
    cuda::fill_device_memory(data_->scales.get(), 0, data_->scales.bytes(), "clearing memory");
}
Activations::~Activations() { delete data_; }

void run_step(ThreadPool& pool, const StepInputs& inputs, const std::function<void(Team&)>& forward) {
    cuda::context_of(pool).run(inputs, [&] { pool.run(forward); });
}

void embed(Team&, const Weight& table, const std::int32_t*, std::int64_t m, float* x) {
    const Context& context = Context::current();
    cuda::embed(context.queue(), tiles_of(table), context.step(), context.chosen(), context.padded(m), x);
}

void rms_norm(Team&, const float* x, const float* gamma, float eps, std::int64_t m, std::int64_t cols,
              Activations& out) {
    quantize_into(x, gamma, eps, m, cols, out);
}

void quantize(Team&, const float* x, std::int64_t m, std::int64_t cols, Activations& out) {
    quantize_into(x, nullptr, 0.0f, m, cols, out);
}

void matmul(Team&, const Activations& x, std::span<const Projection> projections) {
    for (std::size_t begin = 0; begin < projections.size();) {  // a launch for neighbours of one scheme
        MatmulArgs args = args_for(x);
        while (begin < projections.size() && args.count < MatmulArgs::kMaxProducts &&
               (args.count == 0 || projections[begin].weight->scheme == projections[begin - 1].weight->scheme)) {
            const Projection& p = projections[begin++];
            args.products[args.count++] = {tiles_of(*p.weight), {}, p.bias, nullptr, p.out, p.stride};
        }
        run(args, Epilogue::store);
    }
}

void matmul_add(Team&, const Activations& a, const Weight& w, const float* bias, float* x) {
    MatmulArgs args = args_for(a);
    args.products[args.count++] = {tiles_of(w), {}, bias, nullptr, x, w.rows};
    run(args, Epilogue::add);
}

void matmul_swiglu(Team& team, const Activations& a, const Weight& gate, const float* gate_bias, const Weight& up,
                   const float* up_bias, float* h, Activations* out) {
    if (gate.scheme != up.scheme) throw std::invalid_argument("gate_proj and up_proj have different schemes");
    MatmulArgs args = args_for(a);
    args.products[args.count++] = {tiles_of(gate), tiles_of(up), gate_bias, up_bias, h, gate.rows};
    run(args, Epilogue::swiglu);
    if (out) quantize(team, h, a.data().m, gate.rows, *out);
}

void rope_append(Team&, float* q, float* k, const float* v, const float*, const float*, int heads,
                 std::span<const SequenceRows>, const KvCache& cache, int layer) {
    const Context& context = Context::current();
    const cuda::AttentionArgs args = context.attention_args(cache, layer, heads);
    cuda::rope_append(context.queue(), args.step, context.shape().rows, q, k, v, heads, args.cache);
}

void attention(Team& team, float* q, int heads, const NewKeys* fresh, std::span<const SequenceRows> sequences,
               const KvCache& cache, int layer, float* attended, Activations* out) {
    const Context& context = Context::current();
    const cuda::StepShape& shape = context.shape();
    if (fresh) rope_append(team, q, fresh->k, fresh->v, fresh->cos, fresh->sin, heads, sequences, cache, layer);
    cuda::AttentionArgs args = context.attention_args(cache, layer, heads);
    args.q = q;
    args.out = attended;
    if (shape.decode_tiles) {
        args.tiles = shape.decode_tiles;
        cuda::attention_decode(context.queue(), args);
    }
    if (shape.prefill_tiles) {
        args.first_tile = shape.decode_tiles;
        args.tiles = shape.prefill_tiles;
        cuda::attention_prefill(context.queue(), args);
    }
    if (out) quantize(team, attended, shape.rows, std::int64_t(heads) * cache.layout().head_dim, *out);
}

void gather_rows(Team&, const float* x, const std::int32_t*, std::int64_t count, std::int64_t cols, float* out) {
    const Context& context = Context::current();
    cuda::gather_rows(context.queue(), x, context.step(), context.padded(count), static_cast<int>(cols), out);
}

}  // namespace ops
}  // namespace cnl
