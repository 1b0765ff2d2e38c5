// The sum of the squares of all elements of several tensors, the same for any number of threads.
#include <algorithm>
#include <vector>

#include "common/kernel_table.h"
#include "common/tensors.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kElementsPerPart = 4096, kPartsPerTask = 8;

struct Part {
  const Tensor* tensor;
  int64_t first, size;
};

Tensor square_sum(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "square_sum: expected a tensor at least");
  std::vector<Part> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = as_contiguous(tensors[i]);
    const int64_t size = tensors[i].numel();
    for (int64_t first = 0; first < size; first += kElementsPerPart) {
      parts.push_back({&tensors[i], first, std::min(kElementsPerPart, size - first)});
    }
  }
  std::vector<double> sums(parts.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), kPartsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& part = parts[i];
      dispatch_floating(part.tensor->scalar_type(), [&]<typename T>() {
        const T* data = part.tensor->const_data_ptr<T>() + part.first;
        const auto [sum] = sum_each_vec<1>(part.size, [&](auto at, auto, Vec* totals) {
          const Vec v = at(data);
          totals[0] += v * v;
        });
        sums[i] = sum;
      });
    }
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
