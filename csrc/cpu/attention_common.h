// What the forward and backward of attention on CPU share: the call, its tiles, and how scores are made of products.
//
// Scores are held transposed, S^T[j][i]: a vector's lanes are queries, so that maxima, sums and masks need no
// horizontal step. A tile is kKeys keys by kQueries queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/tensors.h"
#include "cpu/philox_vec.h"
#include "cpu/tasks.h"
#include "cpu/tile_matmul.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kVecs = 3;
constexpr int64_t kQueries = kVecs * kLanes;
constexpr int64_t kKeys = 48;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A (B, S, H, D) or, packed, (T, H, D) tensor with its last dimension contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride, row_stride, head_stride;
  T* at(int64_t batch, int64_t row, int64_t head) const {
    return data + batch * batch_stride + row * row_stride + head * head_stride;
  }
};

// One sequence of the batch: its rows in q and in k and v.
struct Sequence {
  int64_t batch, q_start, q_len, k_start, k_len;
};

struct Options {
  float scale, softcap, dropout;
  int64_t left, right;  // keys visible before and after the query's own position; kUnlimited where unbounded
  uint64_t seed;
};
constexpr int64_t kUnlimited = int64_t{1} << 40;

struct Shape {
  int64_t heads, kv_heads, size, value_size;
  int64_t group() const { return heads / kv_heads; }
};

// Sizes of a head in units, as each operand needs them.
template <typename U>
struct Padded {
  int64_t depth, rows, lanes;  // along K, as rows of A, as lanes of B
  explicit Padded(int64_t size)
      : depth(round_up((size + kDepth<U> - 1) / kDepth<U>, kDepthStep<U>)),
        rows(round_up(size, kRows<U>)),
        lanes(round_up(size, kLanes)) {}
};

// The keys that the queries [first, last) of a sequence see: [begin, end).
struct KeyRange {
  int64_t begin, end;
};
inline KeyRange visible_keys(const Options& options, const Sequence& s, int64_t first, int64_t last) {
  const int64_t shift = s.k_len - s.q_len;
  return {std::clamp<int64_t>(first + shift - options.left, 0, s.k_len),
          std::clamp<int64_t>(last + shift + options.right, 0, s.k_len)};
}

// Turns a tile's products q.k into scores, a vector `vec` of queries of a key's `row` at a time: -inf for hidden keys,
// where the tile is `masked`. slope is d score / d product, where a gradient wants it.
struct ScoreTile {
  const Options& options;
  float alibi;    // bias -alibi * |distance|
  int64_t shift;  // k_len - q_len: queries are aligned to the last key
  int64_t first_query, first_key, k_len;

  bool cut() const {
    const int64_t position = first_query + shift;
    return first_key + kKeys > k_len || first_key < position + kQueries - 1 - options.left ||
           first_key + kKeys - 1 > position + options.right;
  }

  static Vec lane_numbers() {
    Vec lanes;
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
    return lanes;
  }

  template <bool with_slope>
  Vec score(Vec product, int64_t row, int64_t vec, bool masked, Vec& slope) const {
    Vec s = product * options.scale;
    if (with_slope) slope = broadcast(options.scale);
    if (options.softcap > 0.0f) {
      const Vec capped = tanh(s * (1.0f / options.softcap));
      s = capped * options.softcap;
      if (with_slope) slope *= 1.0f - capped * capped;
    }
    if (!masked && alibi == 0.0f) return s;
    // distance = key position - query position, exact in float below 2^24
    const float base = static_cast<float>(first_key + row - (first_query + vec * kLanes + shift));
    const Vec distance = base - lane_numbers();
    if (alibi != 0.0f) s -= alibi * max(distance, -distance);
    if (masked) {
      const Vec hidden = broadcast(-kInfinity);
      if (first_key + row >= k_len) return hidden;
      s = distance >= -static_cast<float>(options.left) ? s : hidden;
      s = distance <= static_cast<float>(options.right) ? s : hidden;
    }
    return s;
  }
};

// Dropout of the probabilities: keeps those whose random word reaches the threshold. The word of (query i, key j) of a
// head is word j % 4 of Philox at the counter (j / 4, i, batch * heads + head, 0).
struct Dropout {
  uint64_t seed;
  uint32_t stream, threshold;

  Dropout(const Options& options, int64_t stream_)
      : seed(options.seed),
        stream(static_cast<uint32_t>(stream_)),
        threshold(static_cast<uint32_t>(std::min(4294967295.0, std::ldexp(static_cast<double>(options.dropout), 32)))) {
  }

  // Masks, all bits or none, for keys j .. j + 3 (j a multiple of 4) and a vector of queries from i on.
  void masks(int64_t j, int64_t i, IntVec (&keep)[4]) const {
    UIntVec words[4] = {};
    words[0] += static_cast<uint32_t>(j / 4);
    for (int64_t lane = 0; lane < kLanes; ++lane) words[1][lane] = static_cast<uint32_t>(i + lane);
    words[2] += stream;
    philox(words, seed);
    for (int r = 0; r < 4; ++r) keep[r] = words[r] >= threshold;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
