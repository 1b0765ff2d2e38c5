// The arguments of the dispatch to experts as its operators receive them, checked: a row of T or of the grouped rows
// each, E + 1 offsets, and row_of_pair, (T, k), or (P,) beside T + 1 token_offsets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "checks.h"

namespace memkernels {

// The number of grouped rows.
inline int64_t check_moe_plan(const Tensor& expert_ids, int64_t num_experts, int64_t capacity) {
  const ScalarType dtype = expert_ids.scalar_type();
  const int64_t pairs = expert_ids.numel();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "expert_ids: expected dtype Int or Long, got ",
                  toString(dtype));
  STD_TORCH_CHECK(pairs <= INT32_MAX, "expert_ids: expected at most 2^31 - 1 elements, got ", pairs);
  STD_TORCH_CHECK(num_experts >= 1 && num_experts < INT32_MAX, "num_experts: expected 1 to 2^31 - 2, got ",
                  num_experts);
  STD_TORCH_CHECK(capacity >= 0, "capacity: expected at least 0, got ", capacity);
  return std::min(pairs, num_experts * std::min(capacity, pairs));
}

// The rows of choices, a weight for each, and whose they are.
inline void check_choices(const Tensor& row_of_pair, const std::optional<Tensor>& weights,
                          const std::optional<Tensor>& token_offsets) {
  check_dtype("row_of_pair", row_of_pair, ScalarType::Int);
  check_dim("row_of_pair", row_of_pair, token_offsets.has_value() ? 1 : 2);
  check_tensor("weights", weights, ScalarType::Float, row_of_pair.sizes());
  if (!token_offsets.has_value()) return;
  check_dtype("token_offsets", *token_offsets, ScalarType::Int);
  STD_TORCH_CHECK(token_offsets->dim() == 1 && token_offsets->size(0) > 0,
                  "token_offsets: expected shape (T + 1,), got ", text_of(token_offsets->sizes()));
}

inline int64_t token_count(const Tensor& row_of_pair, const std::optional<Tensor>& token_offsets) {
  return token_offsets.has_value() ? token_offsets->size(0) - 1 : row_of_pair.size(0);
}

// Its last element is read: how many rows belong to experts.
inline void check_offsets(const Tensor& offsets) {
  check_dtype("offsets", offsets, ScalarType::Int);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "offsets: expected shape (E + 1,), got ",
                  text_of(offsets.sizes()));
}

inline void check_moe_dispatch(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& row_of_pair,
                               const Tensor& offsets, int64_t rows, const std::optional<Tensor>& token_offsets) {
  check_choices(row_of_pair, weights, token_offsets);
  check_dim("x", x, 2);
  const int64_t tokens = token_count(row_of_pair, token_offsets);
  STD_TORCH_CHECK(x.size(0) == tokens, "x: expected ", tokens, " tokens, as the plan has, got ", x.size(0));
  check_offsets(offsets);
  STD_TORCH_CHECK(rows >= 0, "rows: expected at least 0, got ", rows);
}

inline void check_moe_combine(const Tensor& y_grouped, const std::optional<Tensor>& weights, const Tensor& row_of_pair,
                              const std::optional<Tensor>& token_offsets) {
  check_choices(row_of_pair, weights, token_offsets);
  check_dim("y_grouped", y_grouped, 2);
}

inline void check_moe_combine_bwd(const Tensor& dy, const Tensor& y_grouped, const Tensor& weights,
                                  const Tensor& row_of_pair, const Tensor& offsets,
                                  const std::optional<Tensor>& token_offsets) {
  check_moe_combine(y_grouped, weights, row_of_pair, token_offsets);
  check_tensor("dy", dy, y_grouped.scalar_type(), {token_count(row_of_pair, token_offsets), y_grouped.size(1)});
  check_offsets(offsets);
}

}  // namespace memkernels
