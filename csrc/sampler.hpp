// SPDX-License-Identifier: Apache-2.0
// Logits to one token: penalty, truncation, temperature, draw. No dependency on the machine: its own exponential and
// its own generator, and sums in a fixed order.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace cnl {

struct SamplerOptions {
    double temperature = 0.0;         // 0: the most likely token
    std::int64_t top_k = 0;           // 0: all
    double top_p = 1.0;               // 1: all
    double min_p = 0.0;               // 0: all
    double repeat_penalty = 1.0;      // 1: none
    std::int64_t repeat_last_n = 64;  // tokens of history it reads; -1: all of it
    std::uint64_t seed = 0;
};

/// xoshiro256** (Blackman and Vigna, public domain), seeded by splitmix64.
class Random {
 public:
    explicit Random(std::uint64_t seed);
    std::uint64_t next();
    double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }  // [0, 1)

 private:
    std::uint64_t state_[4];
};

/// One sequence's sampler. The order of the steps, each on what the one before left:
///   1. banned ids drop out
///   2. repetition penalty on the ids of the last n tokens: logit / p when positive, logit * p when negative
///   3. temperature 0: the largest logit, the lowest id among equals. Otherwise
///   4. top-k: the k largest logits, the lowest ids among equals
///   5. top-p: the fewest of those, largest first, that hold at least p of their probability
///   6. min-p: those with at least min_p times the probability of the largest
///   7. softmax(logits / temperature), one draw
class Sampler {
 public:
    struct Choice {
        std::int32_t token = 0;
        double logprob = 0;  // log softmax(logits)[token], of the logits as given
        std::vector<std::pair<std::int32_t, double>> top;
    };

    /// Throws std::invalid_argument for an option outside its range.
    explicit Sampler(const SamplerOptions& options);

    /// Adds tokens, >= 0, to the history that the penalty reads.
    void accept(std::span<const std::int32_t> tokens);

    /// Chooses a token and adds it to the history. logits float [vocab]; -inf means impossible. banned: ids in
    /// [0, vocab). top: how many of the most likely ids to list, at most vocab. Throws std::invalid_argument for NaN or
    /// +inf, for ids outside the vocabulary and when no token is left.
    ///
    /// With ids, ascending, logits[i] is that of token ids[i], all others are impossible, and top is 0. The token is
    /// the same as from all logits when these are the largest ones, as many as needed() says.
    Choice sample(std::span<const float> logits, std::span<const std::int32_t> banned, std::int64_t top,
                  std::span<const std::int32_t> ids = {});

    /// How many of the largest logits decide the token, whatever the rest is: those that top-k keeps, those that the
    /// penalty and `banned` ids can push out of them, and one more. 0: all of them, where nothing limits the
    /// candidates.
    std::int64_t needed(std::int64_t banned) const;

 private:
    struct Candidate {
        float score;
        std::int32_t id;
        float weight;  // of top-p: exp(score - max)
    };
    static bool before(const Candidate& a, const Candidate& b) {
        return a.score != b.score ? a.score > b.score : a.id < b.id;
    }
    static constexpr std::int64_t kSortedTop = 256;  // up to here top-k leaves its candidates in order
    std::size_t place(std::int32_t id) const;        // of an id in scores_, its size if it is not among them
    void penalize();
    std::size_t keep_top_k();
    std::size_t keep_top_p(std::size_t count, float max);
    Candidate last_kept(float max);
    std::int32_t draw(float max);

    SamplerOptions options_;
    Random random_;
    std::vector<std::int32_t> history_;
    std::span<const std::int32_t> ids_;  // of scores_, while sample() runs; empty: their numbers
    std::vector<float> scores_;          // the logits after steps 1 and 2
    std::vector<Candidate> candidates_;  // of step 4 on
    std::vector<double> weights_;
    std::vector<std::int32_t> recent_;
};

}  // namespace cnl
