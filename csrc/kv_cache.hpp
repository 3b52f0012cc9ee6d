// SPDX-License-Identifier: Apache-2.0
// The key/value cache: pages of 64 positions, several sequences, fp16 or int8. It owns growth, trimming and freeing;
// the model only asks it for room and for page numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace cnl {

enum class KvType { fp16, int8 };

/// One slab holds 64 positions of one kv head of one layer. d = head_dim rounded up to 16 (padding is zero).
///
///   fp16   K [4][d][16] fp16      block b, dimension j, position 16b + lane: 16 scores at a time, no horizontal sum
///          V [64][d]    fp16
///   int8   K [4][d][16] int8,  V [64][d] int8,  K scale [64] fp16,  V scale [64] fp16      value = scale * int8
struct KvLayout {
    static constexpr int kPage = 64;
    static constexpr int kLanes = 16;
    KvType type = KvType::fp16;
    int layers = 0, kv_heads = 0, head_dim = 0;

    int padded_dim() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
    std::size_t element_bytes() const { return type == KvType::fp16 ? 2 : 1; }
    std::size_t v_offset() const { return std::size_t(kPage) * padded_dim() * element_bytes(); }
    std::size_t k_scale_offset() const { return 2 * v_offset(); }
    std::size_t v_scale_offset() const { return k_scale_offset() + kPage * 2; }
    std::size_t slab_bytes() const { return 2 * v_offset() + (type == KvType::int8 ? 2 * kPage * 2 : 0); }
    std::size_t page_bytes() const { return slab_bytes() * std::size_t(kv_heads) * std::size_t(layers); }
};

class KvCache {
 public:
    /// Reserves address room for `pages` pages; memory is taken as positions are written. Throws std::runtime_error
    /// with the size in GiB when the system refuses.
    KvCache(const KvLayout& layout, std::int64_t pages);
    ~KvCache();
    KvCache(const KvCache&) = delete;
    KvCache& operator=(const KvCache&) = delete;

    const KvLayout& layout() const { return layout_; }
    std::int64_t pages_total() const { return pages_; }
    std::int64_t pages_free() const { return static_cast<std::int64_t>(free_.size()); }

    int open();                // a new empty sequence; its id
    void close(int sequence);  // frees its pages. Throws std::invalid_argument for an unknown id, as all below do.
    std::int64_t length(int sequence) const;
    /// Makes room for `count` more positions. Throws std::length_error with both numbers when the pages run out;
    /// nothing has changed then.
    void extend(int sequence, std::int64_t count);
    void trim(int sequence, std::int64_t length);  // forgets positions >= length

    const std::int32_t* page_table(int sequence) const;
    std::uint8_t* slab(std::int32_t page, int layer, int kv_head) const {
        return base_ +
               (static_cast<std::size_t>(page) * layout_.layers + layer) * layout_.kv_heads * layout_.slab_bytes() +
               static_cast<std::size_t>(kv_head) * layout_.slab_bytes();
    }

 private:
    struct Sequence {
        bool open = false;
        std::int64_t length = 0;
        std::vector<std::int32_t> pages;
    };
    Sequence& at(int sequence);
    const Sequence& at(int sequence) const;

    KvLayout layout_;
    std::int64_t pages_;
    std::uint8_t* base_ = nullptr;
    std::vector<std::int32_t> free_;
    std::vector<Sequence> sequences_;
};

}  // namespace cnl
