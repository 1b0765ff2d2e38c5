// What every kernel's host code needs of tensors: the floating dtypes, contiguous inputs, empty outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace memkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls body.operator()<T>() with T float, BFloat16 or Half, as the dtype says.
template <typename Body>
void dispatch_floating(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::BFloat16:
      return body.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half:
      return body.template operator()<torch::headeronly::Half>();
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16, got dtype number ", static_cast<int>(dtype));
  }
}

// The same for a pair: activations of type T with parameters W of the same dtype or float32.
template <typename Body>
void dispatch_floating(ScalarType dtype, ScalarType parameter_dtype, Body&& body) {
  dispatch_floating(dtype, [&]<typename T>() {
    if (parameter_dtype == dtype) return body.template operator()<T, T>();
    STD_TORCH_CHECK(parameter_dtype == ScalarType::Float, "parameters must be float32 or of the activations' dtype");
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
