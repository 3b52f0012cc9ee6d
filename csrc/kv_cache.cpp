// SPDX-License-Identifier: Apache-2.0
#include "kv_cache.hpp"

#include <stdexcept>
#include <string>

#include "memory.hpp"

namespace cnl {

namespace {

std::int64_t pages_for(std::int64_t positions) { return (positions + KvLayout::kPage - 1) / KvLayout::kPage; }

}  // namespace

KvCache::KvCache(const KvLayout& layout, std::int64_t pages) : layout_(layout), pages_(pages) {
    const std::size_t bytes = layout.page_bytes() * static_cast<std::size_t>(pages);
    try {
        base_ = static_cast<std::uint8_t*>(memory::reserve(bytes));
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(std::string("the key/value cache: ") + error.what() + "; use a smaller context");
    }
    // Handed out from the back, so page 0 goes first and a short sequence stays in low memory.
    free_.reserve(static_cast<std::size_t>(pages));
    for (std::int64_t page = pages; page-- > 0;) free_.push_back(static_cast<std::int32_t>(page));
}

KvCache::~KvCache() { memory::release(base_, layout_.page_bytes() * static_cast<std::size_t>(pages_)); }

const KvCache::Sequence& KvCache::at(int sequence) const {
    if (sequence < 0 || static_cast<std::size_t>(sequence) >= sequences_.size() ||
        !sequences_[static_cast<std::size_t>(sequence)].open)
        throw std::invalid_argument("sequence " + std::to_string(sequence) + " is not open");
    return sequences_[static_cast<std::size_t>(sequence)];
}

KvCache::Sequence& KvCache::at(int sequence) {
    return const_cast<Sequence&>(static_cast<const KvCache&>(*this).at(sequence));
}

int KvCache::open() {
    std::size_t id = 0;
    while (id < sequences_.size() && sequences_[id].open) ++id;
    if (id == sequences_.size()) sequences_.emplace_back();
    sequences_[id].open = true;
    return static_cast<int>(id);
}

void KvCache::close(int sequence) {
    trim(sequence, 0);
    at(sequence).open = false;
}

std::int64_t KvCache::length(int sequence) const { return at(sequence).length; }

void KvCache::extend(int sequence, std::int64_t count) {
    Sequence& s = at(sequence);
    const std::int64_t missing = pages_for(s.length + count) - static_cast<std::int64_t>(s.pages.size());
    if (missing > pages_free())
        throw std::length_error("the key/value cache is full: sequence " + std::to_string(sequence) + " has " +
                                std::to_string(s.length) + " positions and asks for " + std::to_string(count) +
                                " more, but only " + std::to_string(pages_free()) + " of " + std::to_string(pages_) +
                                " pages of " + std::to_string(KvLayout::kPage) + " are free");
    for (std::int64_t i = 0; i < missing; ++i) {
        s.pages.push_back(free_.back());
        free_.pop_back();
    }
    s.length += count;
}

void KvCache::trim(int sequence, std::int64_t length) {
    Sequence& s = at(sequence);
    if (length < 0 || length > s.length)
        throw std::invalid_argument("cannot trim sequence " + std::to_string(sequence) + " of " +
                                    std::to_string(s.length) + " positions to " + std::to_string(length));
    s.length = length;
    while (static_cast<std::int64_t>(s.pages.size()) > pages_for(length)) {
        free_.push_back(s.pages.back());
        s.pages.pop_back();
    }
}

const std::int32_t* KvCache::page_table(int sequence) const { return at(sequence).pages.data(); }

}  // namespace cnl
