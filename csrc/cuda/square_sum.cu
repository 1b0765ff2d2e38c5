// The sum of the squares of all elements of several CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_tensors.h"
#include "square_sum.cuh"

namespace memkernels::cuda {
namespace {

Tensor square_sum(std::vector<Tensor> tensors) {
  std::tuple<std::vector<Array<float>>, std::vector<Array<__half>>, std::vector<Array<__nv_bfloat16>>> arrays;
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
      std::get<std::vector<Array<Element>>>(arrays).push_back(array);
    });
  }
  const Tensor sums = torch::stable::new_empty(tensors[0], {parts}, ScalarType::Double);
  Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  double* next = sums.mutable_data_ptr<double>();
  std::apply([&](const auto&... of) { ((next = launch_square_sum(of, next, stream)), ...); }, arrays);
  launch_square_sum_total(sums.const_data_ptr<double>(), parts, result.mutable_data_ptr<double>(), stream);
  return result;
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("square_sum", TORCH_BOX(&square_sum));
}

}  // namespace
}  // namespace memkernels::cuda
