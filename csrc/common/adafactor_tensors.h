// What Adafactor's operators receive, checked.
#pragma once

#include <optional>
#include <utility>

#include "adafactor.h"
#include "checks.h"

namespace memkernels {

inline Matrices make_matrices(const Tensor& grad) {
  check_dim("grad", grad, 3);
  return {grad.size(0), grad.size(1), grad.size(2)};
}

// Of the elements of `first`. The columns' factors have one dimension at least where there are several; what precedes
// it counts the matrices.
inline Factors make_factors(const Tensor& rows, const Tensor& columns, double most, const Tensor& first) {
  for (const auto& [name, tensor] : {std::pair("rows", rows), std::pair("columns", columns)}) {
    check_dtype(name, tensor, ScalarType::Float);
    check_device(name, tensor, first);
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  }
  const int64_t size = first.numel(), width = columns.dim() == 0 ? 1 : columns.size(-1);
  const int64_t count = width == 0 ? 0 : columns.numel() / width;
  STD_TORCH_CHECK(size == 0 || rows.numel() * width == size, "rows: expected ", width == 0 ? 0 : size / width,
                  " elements, got ", rows.numel());
  STD_TORCH_CHECK(size == 0 || rows.numel() % count == 0, "columns: expected those of whole matrices, got ", count,
                  " rows of them");
  const int64_t of_each = count == 0 ? 0 : rows.numel() / count;
  return {
      rows.const_data_ptr<float>(), columns.const_data_ptr<float>(), {count, of_each, width}, static_cast<float>(most)};
}

// The factor of a gradient beside its number, null where there is none.
inline const float* make_grad_factor(const std::optional<Tensor>& grad_factor, const Tensor& grad) {
  if (!grad_factor.has_value()) return nullptr;
  check_one_element("grad_factor", *grad_factor, ScalarType::Float);
  check_device("grad_factor", *grad_factor, grad);
  return grad_factor->const_data_ptr<float>();
}

}  // namespace memkernels
