// What every kernel's host code needs of tensors: the floating dtypes, contiguous inputs, empty outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace memkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls body.operator()<T>() with T float, BFloat16 or Half, the dtype of the argument of that name.
template <typename Body>
void dispatch_floating(const char* name, const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::BFloat16:
      return body.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half:
      return body.template operator()<torch::headeronly::Half>();
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got dtype ",
                      toString(tensor.scalar_type()));
  }
}

// The same for a pair: T of the tensor, with W of the same dtype or float32, as the second name says.
template <typename Body>
void dispatch_floating(const char* name, const Tensor& tensor, const char* second_name, ScalarType second_dtype,
                       Body&& body) {
  dispatch_floating(name, tensor, [&]<typename T>() {
    if (second_dtype == tensor.scalar_type()) return body.template operator()<T, T>();
    STD_TORCH_CHECK(second_dtype == ScalarType::Float, second_name, ": expected dtype ", toString(tensor.scalar_type()),
                    ", that of ", name, ", or Float, got ", toString(second_dtype));
    body.template operator()<T, float>();
  });
}

inline Tensor as_contiguous(const Tensor& t) {
  return torch::stable::contiguous(t);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

// The leading dimensions of x flattened into rows of its last.
inline int64_t row_count(const Tensor& x) {
  return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
}

}  // namespace memkernels
