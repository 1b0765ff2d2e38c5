// Rows to their experts and back. A token's choices are neighbours, k each or as many as token_offsets says; choice p
// of token t has row r = row_of_pair[p] of the grouped rows, or none (-1):
//   dispatch:     x_grouped[r] = w[p] x[t]
//   combine:      y[t] = sum over t's p of w[p] y_grouped[r]
//   combine_bwd:  dy_grouped[r] = w[p] dy[t], dw[p] = <dy[t], y_grouped[r]>
// w is 1 where there are no weights. Each row of tokens is read or written once; sums are float32, in the order of p.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/kernel_table.h"
#include "common/moe_tensors.h"
#include "cpu/outputs.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kElementsPerTask = 32768;
// Choices of a token that are summed at a time: sums stay in registers.
constexpr int64_t kChoices = 8;
constexpr int64_t kLineBytes = 64;

// The choices of the tokens and their rows, checked against the rows there are.
struct Rows {
  Tensor table;
  std::optional<Tensor> starts;
  const int32_t* of_pair;
  const int32_t* token_offsets;  // null: `choices` a token
  int64_t pairs, tokens, choices;

  Rows(const Tensor& row_of_pair, const std::optional<Tensor>& offsets, int64_t rows)
      : table(as_contiguous(row_of_pair)),
        starts(as_contiguous(offsets)),
        of_pair(table.const_data_ptr<int32_t>()),
        token_offsets(data_or_null<int32_t>(starts)),
        pairs(table.numel()),
        tokens(token_count(table, starts)),
        choices(starts.has_value() ? 0 : table.size(1)) {
    int32_t least = -1, most = -1;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      least = std::min(least, of_pair[pair]);
      most = std::max(most, of_pair[pair]);
    }
    STD_TORCH_CHECK(least >= -1 && most < rows, "plan: expected rows from -1 to ", rows - 1, ", got ", least, " to ",
                    most);
    if (token_offsets == nullptr) return;
    bool ordered = token_offsets[0] == 0 && token_offsets[tokens] <= pairs;
    for (int64_t token = 0; token < tokens; ++token) ordered &= token_offsets[token] <= token_offsets[token + 1];
    STD_TORCH_CHECK(ordered, "plan: expected token_offsets that rise from 0 to at most ", pairs);
  }

  // The choices of a token are first(token) to first(token + 1).
  int64_t first(int64_t token) const { return token_offsets == nullptr ? token * choices : token_offsets[token]; }

  int64_t tokens_per_task(int64_t size) const {
    const int64_t of_token = std::max<int64_t>(1, pairs / std::max<int64_t>(1, tokens));
    return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, size * of_token));
  }
};

// The first row that belongs to no expert.
int64_t rows_in_use(const Tensor& offsets, int64_t rows) {
  const int64_t end = offsets.const_data_ptr<int32_t>()[offsets.numel() - 1];
  STD_TORCH_CHECK(end >= 0 && end <= rows, "plan: expected offsets up to ", rows, ", got ", end);
  return end;
}

template <typename T>
void fill_rows_with_zero(T* grouped, int64_t first, int64_t rows, int64_t size) {
  std::memset(static_cast<void*>(grouped + first * size), 0, (rows - first) * size * sizeof(T));
}

// Calls body.template operator()<kStreamed>(): whether rows of whole lines each are written past the caches.
template <typename T, typename Body>
void with_streams(const T* grouped, int64_t rows, int64_t size, const Body& body) {
  const int64_t row_bytes = size * static_cast<int64_t>(sizeof(T));
  const bool whole_lines = row_bytes % kLineBytes == 0 && reinterpret_cast<uintptr_t>(grouped) % kLineBytes == 0;
  if (whole_lines && rows * row_bytes >= kStreamedBytes) {
    body.template operator()<true>();
  } else {
    body.template operator()<false>();
  }
}

template <bool kStreamed, typename T>
void copy_row(T* target, const T* source, int64_t size) {
  const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
  if constexpr (kStreamed) {
    auto* to = reinterpret_cast<float*>(target);
    const auto* from = reinterpret_cast<const float*>(source);
    for_each_vec<true>(bytes / 4, [=](auto at, auto store) { store(to, at(from)); });
  } else {
    std::memcpy(target, source, bytes);
  }
}

Tensor moe_dispatch(const Tensor& x_in, const std::optional<Tensor>& weights_in, const Tensor& row_of_pair,
                    const Tensor& offsets, int64_t num_rows, const std::optional<Tensor>& token_offsets) {
  check_moe_dispatch(x_in, weights_in, row_of_pair, offsets, num_rows, token_offsets);
  const Tensor x = as_contiguous(x_in);
  const std::optional<Tensor> weights = as_contiguous(weights_in);
  const Rows rows(row_of_pair, token_offsets, num_rows);
  const int64_t size = x.size(1), end = rows_in_use(as_contiguous(offsets), num_rows);
  Tensor grouped = new_output(x, {num_rows, size});
  dispatch_floating("x", x, [&]<typename T>() {
    const T* from = x.const_data_ptr<T>();
    const float* factors = data_or_null<float>(weights);
    T* to = grouped.mutable_data_ptr<T>();
    with_streams(to, num_rows, size, [&]<bool kStreamed>() {
      torch::stable::parallel_for(0, rows.tokens, rows.tokens_per_task(size), [&](int64_t begin, int64_t last) {
        for (int64_t token = begin; token < last; ++token) {
          const T* source = from + token * size;
          for (int64_t pair = rows.first(token); pair < rows.first(token + 1); ++pair) {
            const int64_t row = rows.of_pair[pair];
            if (row < 0) continue;
            T* target = to + row * size;
            if (factors == nullptr) {
              copy_row<kStreamed>(target, source, size);
            } else {
              const float factor = factors[pair];
              for_each_vec<kStreamed>(size, [=](auto at, auto store) { store(target, at(source) * factor); });
            }
          }
        }
        end_of_stream();
      });
    });
    fill_rows_with_zero(to, end, num_rows, size);
  });
  return grouped;
}

template <typename T>
void combine_token(const T* grouped, const float* factors, const int32_t* rows, int64_t choices, T* y, int64_t size) {
  const T* sources[kChoices];
  float weights[kChoices];
  int64_t count = 0;
  for (int64_t choice = 0; choice < choices; ++choice) {
    if (rows[choice] < 0) continue;
    sources[count] = grouped + rows[choice] * size;
    weights[count++] = factors == nullptr ? 1.0f : factors[choice];
  }
  for_each_vec(size, [&](auto at, auto to) {
    Vec sum{};
    for (int64_t i = 0; i < count; ++i) sum += at(sources[i]) * weights[i];
    to(y, sum);
  });
}

// More choices than are held at once: sums in float32 beside the result.
template <typename T>
void combine_many(const T* grouped, const float* factors, const int32_t* rows, int64_t choices, T* y, float* sums,
                  int64_t size) {
  std::fill_n(sums, size, 0.0f);
  for (int64_t choice = 0; choice < choices; ++choice) {
    if (rows[choice] < 0) continue;
    const T* source = grouped + rows[choice] * size;
    const float factor = factors == nullptr ? 1.0f : factors[choice];
    for_each_vec(size, [=](auto at, auto to) { to(sums, at(static_cast<const float*>(sums)) + at(source) * factor); });
  }
  for_each_vec(size, [=](auto at, auto to) { to(y, at(static_cast<const float*>(sums))); });
}

Tensor moe_combine(const Tensor& y_grouped_in, const std::optional<Tensor>& weights_in, const Tensor& row_of_pair,
                   const std::optional<Tensor>& token_offsets) {
  check_moe_combine(y_grouped_in, weights_in, row_of_pair, token_offsets);
  const Tensor y_grouped = as_contiguous(y_grouped_in);
  const std::optional<Tensor> weights = as_contiguous(weights_in);
  const Rows rows(row_of_pair, token_offsets, y_grouped.size(0));
  const int64_t size = y_grouped.size(1);
  Tensor y = new_output(y_grouped, {rows.tokens, size});
  dispatch_floating("y_grouped", y_grouped, [&]<typename T>() {
    const T* grouped = y_grouped.const_data_ptr<T>();
    const float* all_factors = data_or_null<float>(weights);
    T* to = y.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows.tokens, rows.tokens_per_task(size), [&](int64_t begin, int64_t last) {
      std::vector<float> sums;
      for (int64_t token = begin; token < last; ++token) {
        const int64_t first = rows.first(token), choices = rows.first(token + 1) - first;
        const float* factors = all_factors == nullptr ? nullptr : all_factors + first;
        if (choices <= kChoices) {
          combine_token(grouped, factors, rows.of_pair + first, choices, to + token * size, size);
        } else {
          sums.resize(size);
          combine_many(grouped, factors, rows.of_pair + first, choices, to + token * size, sums.data(), size);
        }
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> moe_combine_bwd(const Tensor& dy_in, const Tensor& y_grouped_in, const Tensor& weights_in,
                                           const Tensor& row_of_pair, const Tensor& offsets,
                                           const std::optional<Tensor>& token_offsets) {
  check_moe_combine_bwd(dy_in, y_grouped_in, weights_in, row_of_pair, offsets, token_offsets);
  const Tensor dy = as_contiguous(dy_in), y_grouped = as_contiguous(y_grouped_in), weights = as_contiguous(weights_in);
  const int64_t num_rows = y_grouped.size(0), size = y_grouped.size(1);
  const Rows rows(row_of_pair, token_offsets, num_rows);
  const int64_t end = rows_in_use(as_contiguous(offsets), num_rows);
  Tensor dy_grouped = output_like(y_grouped);
  Tensor dweights = torch::stable::empty_like(weights);
  dispatch_floating("dy", dy, [&]<typename T>() {
    const T *from = dy.const_data_ptr<T>(), *values = y_grouped.const_data_ptr<T>();
    const float* factors = weights.const_data_ptr<float>();
    T* to = dy_grouped.mutable_data_ptr<T>();
    float* products = dweights.mutable_data_ptr<float>();
    with_streams(to, num_rows, size, [&]<bool kStreamed>() {
      torch::stable::parallel_for(0, rows.tokens, rows.tokens_per_task(size), [&](int64_t begin, int64_t last) {
        for (int64_t token = begin; token < last; ++token) {
          const T* grad = from + token * size;
          for (int64_t pair = rows.first(token); pair < rows.first(token + 1); ++pair) {
            products[pair] = 0.0f;
            const int64_t row = rows.of_pair[pair];
            if (row < 0) continue;
            const T* value = values + row * size;
            T* target = to + row * size;
            const float factor = factors[pair];
            products[pair] = sum_each_vec<1, kStreamed>(size, [=](auto at, auto store, Vec* sums) {
              const Vec g = at(grad);
              store(target, g * factor);
              sums[0] += g * at(value);
            })[0];
          }
        }
        end_of_stream();
      });
    });
    std::fill(products + rows.first(rows.tokens), products + rows.pairs, 0.0f);
    fill_rows_with_zero(to, end, num_rows, size);
  });
  return {dy_grouped, dweights};
}

MEMKERNELS_CPU_KERNEL(moe_dispatch);
MEMKERNELS_CPU_KERNEL(moe_combine);
MEMKERNELS_CPU_KERNEL(moe_combine_bwd);

}  // namespace
}  // namespace memkernels::cpu
