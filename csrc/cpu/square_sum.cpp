// The sum of the squares of all elements of several tensors, the same for any number of threads.
#include <algorithm>
#include <vector>

#include "common/kernel_table.h"
#include "common/tensors.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kElementsPerPart = 4096, kPartsPerTask = 8;

template <typename T>
double sum_of_squares(const void* data, int64_t size) {
  const auto [sum] = sum_each_vec<1>(size, [=](auto at, auto, Vec* totals) {
    const Vec v = at(static_cast<const T*>(data));
    totals[0] += v * v;
  });
  return sum;
}

struct Part {
  double (*sum)(const void*, int64_t);
  const void* data;
  int64_t size;
};

Tensor square_sum(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors: expected one at least");
  std::vector<Part> parts;
  for (Tensor& tensor : tensors) {
    tensor = as_contiguous(tensor);
    const int64_t size = tensor.numel();
    dispatch_floating("tensors", tensor, [&]<typename T>() {
      const T* data = tensor.const_data_ptr<T>();
      for (int64_t first = 0; first < size; first += kElementsPerPart) {
        parts.push_back({sum_of_squares<T>, data + first, std::min(kElementsPerPart, size - first)});
      }
    });
  }
  std::vector<double> sums(parts.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), kPartsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = parts[i].sum(parts[i].data, parts[i].size);
  });
  Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  double total = 0;
  for (const double sum : sums) total += sum;
  *result.mutable_data_ptr<double>() = total;
  return result;
}

MEMKERNELS_CPU_KERNEL(square_sum);

}  // namespace
}  // namespace memkernels::cpu
