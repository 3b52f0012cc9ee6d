// SPDX-License-Identifier: Apache-2.0
#include "upload.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "kernels.hpp"

namespace cnl::cuda {

namespace {

constexpr std::size_t kPieceBytes = std::size_t(32) << 20;
constexpr std::size_t kAlign = 256;

std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

std::string scheme_list() {
    std::string text;
    for (int i = 0; i < kSchemeCount; ++i)
        text += (i == 0 ? "" : i + 1 < kSchemeCount ? ", " : " and ") + std::string(scheme_at(i).name);
    return text;
}

DeviceWeights::DeviceWeights(const Context& context, std::size_t bytes)
    : context_(context), arena_(bytes, "the model") {}

std::size_t DeviceWeights::device_bytes(const Weight& w) {
    return aligned(static_cast<std::size_t>(tiled_bytes(*w.scheme, w.rows, w.cols)));
}
std::size_t DeviceWeights::device_bytes(std::int64_t floats) { return aligned(static_cast<std::size_t>(floats) * 4); }

std::uint8_t* DeviceWeights::take(std::size_t bytes) {
    if (used_ + bytes > arena_.size()) throw std::logic_error("the tensors are larger than planned");
    std::uint8_t* p = arena_.get() + used_;
    used_ += bytes;
    return p;
}

DeviceWeights::Piece& DeviceWeights::next_piece(std::size_t bytes) {
    Piece& piece = pieces_[next_++ % 2];
    if (piece.used) piece.done.wait();
    if (piece.host.size() < bytes) {
        piece.host = PinnedBytes(std::max(bytes, kPieceBytes), "the upload");
        piece.device = DeviceArray<std::uint8_t>(std::max(bytes, kPieceBytes), "the upload");
    }
    piece.used = true;
    return piece;
}

Weight DeviceWeights::upload(const Weight& w) {
    Weight result = w;
    if (const auto found = known_.find(w.data); found != known_.end()) {
        result.data = found->second;
        return result;
    }
    std::uint8_t* tiles = take(device_bytes(w));
    const std::int64_t pair_bytes = 2 * layout::panel_bytes(*w.scheme, w.cols),
                       pairs = layout::padded_rows(w.rows) / 32;
    const std::int64_t step = std::max<std::int64_t>(1, static_cast<std::int64_t>(kPieceBytes) / pair_bytes);
    for (std::int64_t begin = 0; begin < pairs; begin += step) {
        const std::int64_t end = std::min(pairs, begin + step);
        const auto bytes = static_cast<std::size_t>((end - begin) * pair_bytes);
        Piece& piece = next_piece(bytes);
        std::memcpy(piece.host.get(), w.data + begin * pair_bytes, bytes);
        check(cudaMemcpyAsync(piece.device.get(), piece.host.get(), bytes, cudaMemcpyHostToDevice,
                              context_.stream().get()),
              "uploading the model");
        repack(context_.queue(), *w.scheme, piece.device.get(), w.rows, w.cols, begin, end, tiles);
        piece.done.record(context_.stream());
    }
    known_[w.data] = tiles;
    result.data = tiles;
    return result;
}

const float* DeviceWeights::upload(const float* vector, std::int64_t size) {
    if (!vector) return nullptr;
    const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
    std::uint8_t* to = take(device_bytes(size));
    Piece& piece = next_piece(bytes);
    std::memcpy(piece.host.get(), vector, bytes);
    check(cudaMemcpyAsync(to, piece.host.get(), bytes, cudaMemcpyHostToDevice, context_.stream().get()),
          "uploading the model");
    piece.done.record(context_.stream());
    return reinterpret_cast<const float*>(to);
}

void DeviceWeights::finish() {
    context_.stream().wait();
    for (Piece& piece : pieces_) {
        piece.host = {};
        piece.device = {};
        piece.used = false;
    }
}

}  // namespace cnl::cuda
