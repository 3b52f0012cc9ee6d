// SPDX-License-Identifier: Apache-2.0
#include "sampler.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace cnl {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

/// exp(x) for x <= 0, 0 under -700, relative error under 1e-12. Only additions and multiplications: the math library's
/// differs from machine to machine in the last bit, and a draw must not.
inline double exp_negative(double x) {
    constexpr double kShift = 0x1.8p52;  // adding it rounds to an integer, which then lies in the low bits
    constexpr double kLog2e = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
    const double clamped = x < -700.0 ? -700.0 : x;
    const double shifted = clamped * kLog2e + kShift;
    const double n = shifted - kShift;
    const double r = (clamped - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
    double p = 1.0 / 3628800.0;
    for (const double c :
         {1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
        p = p * r + c;
    const auto exponent = std::bit_cast<std::uint64_t>(shifted) << 52;
    const double scaled = std::bit_cast<double>(std::bit_cast<std::uint64_t>(p) + exponent);
    return x < -700.0 ? 0.0 : scaled;
}

// The loops below keep fixed lanes, so that the compiler may use vectors of any width and the result stays the same.
constexpr std::size_t kLanes = 8;

double sum(std::span<const double> x) {
    double lanes[kLanes] = {};
    const std::size_t whole = x.size() / kLanes * kLanes;
    for (std::size_t i = 0; i < whole; i += kLanes)
        for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
    for (std::size_t i = whole; i < x.size(); ++i) lanes[i - whole] += x[i];
    double total = 0;
    for (const double lane : lanes) total += lane;
    return total;
}

float max_of(std::span<const float> x) {
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, kNever);
    const std::size_t whole = x.size() / kLanes * kLanes;
    for (std::size_t i = 0; i < whole; i += kLanes)
        for (std::size_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (std::size_t i = whole; i < x.size(); ++i) lanes[i - whole] = std::max(lanes[i - whole], x[i]);
    return *std::max_element(lanes, lanes + kLanes);
}

/// Throws for NaN and +inf, which no comparison below would notice.
void check(std::span<const float> logits, std::span<const std::int32_t> ids) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    if (logits.empty()) throw std::invalid_argument("the logits are empty");
    int bad = 0;
    for (const float value : logits) bad |= !(value < kInfinity);
    if (!bad) return;
    for (std::size_t i = 0; i < logits.size(); ++i)
        if (!(logits[i] < kInfinity))
            throw std::invalid_argument("the logit of token " + std::to_string(ids.empty() ? i : std::size_t(ids[i])) +
                                        (std::isnan(logits[i]) ? " is not a number" : " is infinite"));
}

void require(bool ok, const char* name, const char* expected, double value) {
    if (!ok) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
}

}  // namespace

Random::Random(std::uint64_t seed) {
    for (auto& word : state_) {
        seed += 0x9e3779b97f4a7c15u;
        std::uint64_t z = seed;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        word = z ^ z >> 31;
    }
}

std::uint64_t Random::next() {
    const std::uint64_t result = std::rotl(state_[1] * 5, 7) * 9;
    const std::uint64_t t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = std::rotl(state_[3], 45);
    return result;
}

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {
    const auto& o = options_;
    require(std::isfinite(o.temperature) && o.temperature >= 0, "temperature", "a number >= 0", o.temperature);
    require(o.top_k >= 0, "top_k", "an integer >= 0", static_cast<double>(o.top_k));
    require(o.top_p > 0 && o.top_p <= 1, "top_p", "a number over 0 and at most 1", o.top_p);
    require(o.min_p >= 0 && o.min_p <= 1, "min_p", "a number from 0 to 1", o.min_p);
    require(std::isfinite(o.repeat_penalty) && o.repeat_penalty > 0, "repeat_penalty", "a number over 0",
            o.repeat_penalty);
    require(o.repeat_last_n >= -1, "repeat_last_n", "an integer >= -1", static_cast<double>(o.repeat_last_n));
}

void Sampler::accept(std::span<const std::int32_t> tokens) {
    for (const auto token : tokens)
        if (token < 0) throw std::invalid_argument("token " + std::to_string(token) + " is negative");
    history_.insert(history_.end(), tokens.begin(), tokens.end());
    const auto keep = static_cast<std::size_t>(options_.repeat_last_n);
    if (options_.repeat_last_n >= 0 && history_.size() / 2 > keep + 512)  // keep may be near the largest number
        history_.erase(history_.begin(), history_.end() - static_cast<std::ptrdiff_t>(keep));
}

std::int64_t Sampler::needed(std::int64_t banned) const {
    const auto& o = options_;
    const std::int64_t kept = o.temperature == 0 ? 1 : o.top_k;
    if (kept == 0 || kept > kSortedTop || o.repeat_penalty < 1.0) return 0;
    const std::int64_t penalized = o.repeat_penalty == 1.0 ? 0
                                   : o.repeat_last_n < 0
                                       ? static_cast<std::int64_t>(history_.size())
                                       : std::min(o.repeat_last_n, static_cast<std::int64_t>(history_.size()));
    return kept + penalized + banned + 1;
}

std::size_t Sampler::place(std::int32_t id) const {
    if (ids_.empty()) return std::min(static_cast<std::size_t>(id), scores_.size());
    const auto found = std::lower_bound(ids_.begin(), ids_.end(), id);
    return found != ids_.end() && *found == id ? static_cast<std::size_t>(found - ids_.begin()) : scores_.size();
}

void Sampler::penalize() {
    if (options_.repeat_penalty == 1.0) return;
    const auto last = options_.repeat_last_n < 0
                          ? history_.size()
                          : std::min(history_.size(), static_cast<std::size_t>(options_.repeat_last_n));
    recent_.assign(history_.end() - static_cast<std::ptrdiff_t>(last), history_.end());
    std::sort(recent_.begin(), recent_.end());
    recent_.erase(std::unique(recent_.begin(), recent_.end()), recent_.end());
    const auto penalty = static_cast<float>(options_.repeat_penalty);
    for (const auto id : recent_) {
        const std::size_t at = place(id);
        if (at == scores_.size()) continue;
        float& score = scores_[at];
        if (score == kNever || score == 0) continue;
        // The smallest and largest penalties are 0 and infinity in float, and quotients may leave its range.
        score = std::clamp(score > 0 ? score / penalty : score * penalty, -kLargest, kLargest);
    }
}

/// The candidates that top-k keeps are moved to the front; returns their number.
std::size_t Sampler::keep_top_k() {
    const auto k = static_cast<std::size_t>(options_.top_k);
    if (k == 0 || k >= candidates_.size()) return candidates_.size();
    const auto first = candidates_.begin(), kth = first + static_cast<std::ptrdiff_t>(k);
    if (options_.top_k <= kSortedTop)
        std::partial_sort(first, kth, candidates_.end(), before);  // a heap of k: one cheap comparison each
    else
        std::nth_element(first, kth - 1, candidates_.end(), before);
    return k;
}

/// The same for top-p of the first `count`. A quickselect that weighs instead of counting: no sort, and the expected
/// time is linear even when all logits are alike.
std::size_t Sampler::keep_top_p(std::size_t count, float max) {
    double total = 0, near = 0;
    const float near_score = max - 8.0f;
    for (std::size_t i = 0; i < count; ++i) {
        Candidate& c = candidates_[i];
        c.weight = static_cast<float>(exp_negative(static_cast<double>(c.score) - max));
        total += c.weight;
        near += c.score >= near_score ? c.weight : 0.0f;
    }
    double need = options_.top_p * total;
    std::size_t low = 0, high = count;
    if (near >= need) {
        const auto begin = candidates_.begin();
        const auto end = std::partition(begin, begin + static_cast<std::ptrdiff_t>(count),
                                        [&](const Candidate& c) { return c.score >= near_score; });
        high = static_cast<std::size_t>(end - begin);
    }
    while (low < high) {
        std::swap(candidates_[low], candidates_[low + (high - low) / 2]);
        const Candidate pivot = candidates_[low];
        std::size_t middle = low;
        double above = 0;
        for (std::size_t i = low + 1; i < high; ++i) {
            if (!before(candidates_[i], pivot)) continue;
            above += candidates_[i].weight;
            std::swap(candidates_[++middle], candidates_[i]);
        }
        std::swap(candidates_[low], candidates_[middle]);  // [low, middle) come before the pivot at middle
        if (middle > low && above >= need) {
            high = middle;
        } else if (above + pivot.weight >= need) {
            return middle + 1;
        } else {
            need -= above + pivot.weight;
            low = middle + 1;
        }
    }
    return std::max<std::size_t>(low, 1);
}

/// The last candidate, in order of preference, that top-k and top-p keep.
Sampler::Candidate Sampler::last_kept(float max) {
    if (options_.top_k == 0 && options_.top_p == 1) return {kNever, std::numeric_limits<std::int32_t>::max(), 0};
    candidates_.clear();
    for (std::size_t i = 0; i < scores_.size(); ++i)
        if (scores_[i] > kNever) candidates_.push_back({scores_[i], static_cast<std::int32_t>(i), 0});
    std::size_t count = keep_top_k();
    if (options_.top_p < 1) count = keep_top_p(count, max);
    const auto first = candidates_.begin();
    return *std::max_element(first, first + static_cast<std::ptrdiff_t>(count), before);
}

/// One draw. What truncation keeps is walked by id, because its order in memory is up to the standard library.
std::int32_t Sampler::draw(float max) {
    const Candidate last = last_kept(max);
    const double log_min_p =
        options_.min_p > 0 ? std::log(options_.min_p) - 1e-6 : -std::numeric_limits<double>::infinity();
    candidates_.clear();
    for (std::size_t i = 0; i < scores_.size(); ++i) {
        const Candidate c{scores_[i], static_cast<std::int32_t>(i), 0};
        if (c.score < last.score || c.score == kNever || before(last, c)) continue;
        const double below = static_cast<double>(c.score) - max;
        if (below < log_min_p || (options_.min_p > 0 && exp_negative(below) < options_.min_p)) continue;
        candidates_.push_back(c);
    }
    weights_.resize(candidates_.size());
    // Of the smallest temperatures the quotient is infinite, and the largest score's weight would be no number.
    const double scale = std::min(1.0 / options_.temperature, std::numeric_limits<double>::max());
    for (std::size_t i = 0; i < weights_.size(); ++i)
        weights_[i] = exp_negative((static_cast<double>(candidates_[i].score) - max) * scale);
    double left = random_.uniform() * sum(weights_);
    std::int32_t token = candidates_.back().id;  // when rounding uses up the sum
    for (std::size_t i = 0; i < weights_.size(); ++i) {
        left -= weights_[i];
        if (left >= 0) continue;
        token = candidates_[i].id;
        break;
    }
    return token;
}

Sampler::Choice Sampler::sample(std::span<const float> logits, std::span<const std::int32_t> banned, std::int64_t top,
                                std::span<const std::int32_t> ids) {
    if (!ids.empty() && (ids.size() != logits.size() || ids[0] < 0 ||
                         std::adjacent_find(ids.begin(), ids.end(), std::greater_equal()) != ids.end()))
        throw std::invalid_argument("ids must be ascending, one for every logit");
    check(logits, ids);
    ids_ = ids;
    const std::int64_t size = ids.empty() ? static_cast<std::int64_t>(logits.size()) : std::int64_t(ids.back()) + 1;
    require(top >= 0 && top <= (ids.empty() ? size : 0), "logprobs",
            ids.empty() ? "a count from 0 to the size of the vocabulary" : "0 where some logits are missing",
            static_cast<double>(top));
    scores_.assign(logits.begin(), logits.end());
    penalize();
    for (const auto id : banned) {
        if (id < 0 || (id >= size && ids.empty()))
            throw std::invalid_argument("banned token " + std::to_string(id) + " is outside the vocabulary of " +
                                        std::to_string(size));
        if (const std::size_t at = place(id); at < scores_.size()) scores_[at] = kNever;
    }
    const float best = max_of(scores_);
    if (best == kNever) throw std::invalid_argument("no token is left: every one is banned or impossible");

    Choice choice;
    choice.token = options_.temperature == 0
                       ? static_cast<std::int32_t>(std::find(scores_.begin(), scores_.end(), best) - scores_.begin())
                       : draw(best);
    const float max = max_of(logits);
    weights_.resize(logits.size());
    for (std::size_t i = 0; i < logits.size(); ++i) weights_[i] = exp_negative(static_cast<double>(logits[i]) - max);
    const double log_sum = static_cast<double>(max) + std::log(sum(weights_));
    choice.logprob = static_cast<double>(logits[static_cast<std::size_t>(choice.token)]) - log_sum;
    if (top > 0) {
        candidates_.clear();
        for (std::int64_t i = 0; i < size; ++i)
            candidates_.push_back({logits[static_cast<std::size_t>(i)], static_cast<std::int32_t>(i), 0});
        const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(top);
        std::partial_sort(candidates_.begin(), end, candidates_.end(), before);
        for (auto c = candidates_.begin(); c != end; ++c)
            choice.top.emplace_back(c->id, static_cast<double>(c->score) - log_sum);
    }
    if (!ids.empty()) choice.token = ids[static_cast<std::size_t>(choice.token)];
    accept({&choice.token, 1});
    return choice;
}

}  // namespace cnl
