// Checks of what operators receive. An operator may be called by anyone with anything, and kernels trust the host code
// in front of them: it compares each argument with what the kernel reads and writes, before it does anything. Every
// message begins with the argument's name.
#pragma once

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>

#include "tensors.h"

namespace memkernels {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string text_of(Sizes sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ')';
  return text.str();
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got shape ", text_of(tensor.sizes()));
}

// Of the last dimension, which there has to be.
inline int64_t last_size(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0, name, ": expected at least one dimension, got none");
  return tensor.size(-1);
}

inline void check_shape(const char* name, const Tensor& tensor, Sizes sizes) {
  // torch 2.10's headers do not compare the two.
  STD_TORCH_CHECK(std::ranges::equal(tensor.sizes(), sizes), name, ": expected shape ", text_of(sizes), ", got ",
                  text_of(tensor.sizes()));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", toString(dtype), ", got ",
                  toString(tensor.scalar_type()));
}

inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype, Sizes sizes) {
  check_dtype(name, tensor, dtype);
  check_shape(name, tensor, sizes);
}

// None is right too.
inline void check_tensor(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype, Sizes sizes) {
  if (tensor.has_value()) check_tensor(name, *tensor, dtype, sizes);
}

inline void check_one_element(const char* name, const Tensor& tensor, ScalarType dtype) {
  check_dtype(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
}

// Kernels read what they are given on the device of the operator's first tensor.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index(), name, ": expected device number ",
                  first.get_device_index(), ", that of the first tensor, got ", tensor.get_device_index());
}

inline void check_device(const char* name, const std::optional<Tensor>& tensor, const Tensor& first) {
  if (tensor.has_value()) check_device(name, *tensor, first);
}

inline void check_probability(const char* name, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, name, ": expected a probability in [0, 1), got ", p);
}

}  // namespace memkernels
