// The sum of the squares of all elements of several CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_tensors.h"
#include "square_sum.cuh"

namespace memkernels::cuda {
namespace {

Tensor square_sum(std::vector<Tensor> tensors) {
  std::vector<Array<float>> wide;
  std::vector<Array<__half>> half;
  std::vector<Array<__nv_bfloat16>> bfloat16;
  int64_t parts = 0;
  const StreamOf stream(tensors[0]);
  for (Tensor& tensor : tensors) {
    check_device("tensors", tensor, tensors[0]);
    tensor = as_contiguous(tensor);
    if (tensor.numel() == 0) continue;
    dispatch_floating("tensors", tensor, [&]<typename T>() {
      using Element = DeviceType<T>;
      const Array<Element> array{reinterpret_cast<const Element*>(tensor.const_data_ptr<T>()), tensor.numel()};
      parts += array.parts();
      if constexpr (std::is_same_v<Element, float>) wide.push_back(array);
      if constexpr (std::is_same_v<Element, __half>) half.push_back(array);
      if constexpr (std::is_same_v<Element, __nv_bfloat16>) bfloat16.push_back(array);
    });
  }
  const Tensor sums = torch::stable::new_empty(tensors[0], {parts}, ScalarType::Double);
  Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  double* next = sums.mutable_data_ptr<double>();
  const auto run = [&](const auto& arrays) {
    launch_square_sum(arrays, next, stream);
    for (const auto& array : arrays) next += array.parts();
  };
  run(wide);
  run(half);
  run(bfloat16);
  launch_square_sum_total(sums.const_data_ptr<double>(), parts, result.mutable_data_ptr<double>(), stream);
  return result;
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("square_sum", TORCH_BOX(&square_sum));
}

}  // namespace
}  // namespace memkernels::cuda
