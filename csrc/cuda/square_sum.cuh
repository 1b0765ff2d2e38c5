// The sum of the squares of all elements of several tensors, the same on every run: a block sums a part of a tensor, in
// float32 for each thread and in float64 over the threads; one block then sums the parts in their order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "../common/cuda_convert.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/cuda_pack.cuh"
#include "../common/cuda_reduce.cuh"

namespace memkernels::cuda {

constexpr int kSquareThreads = 256;
constexpr int64_t kPartElements = 32 * kSquareThreads;
constexpr int kArrays = 64;  // of a launch, a power of two

template <typename T>
struct Array {
  const T* data;
  int64_t size;

  int64_t parts() const { return (size + kPartElements - 1) / kPartElements; }
};

// Parts are counted over all arrays.
template <typename T>
struct ArrayTable {
  Array<T> arrays[kArrays];
  int64_t first_part[kArrays];  // beyond the last array above any part
};

// sums[part] of each part. Reads every element once.
template <typename T>
__global__ void __launch_bounds__(kSquareThreads)
    square_sum_kernel(const __grid_constant__ ArrayTable<T> table, double* sums) {
  const int64_t part = blockIdx.x;
  const int at = owner_of(table.first_part, part);
  const int64_t first = (part - table.first_part[at]) * kPartElements;
  const int64_t left = table.arrays[at].size - first;
  float sum = 0.0f;
  for_each_pack(table.arrays[at].data + first, left < kPartElements ? left : kPartElements,
                static_cast<int>(threadIdx.x), kSquareThreads, [&](const auto& pack, int64_t) {
                  const auto held = pack;
#pragma unroll
                  for (auto element : held.value) {
                    const float value = to_float(element);
                    sum += value * value;
                  }
                });
  const double total = block_reduce<kSquareThreads>(static_cast<double>(sum), Sum());
  if (threadIdx.x == 0) sums[part] = total;
}

// One block.
static __global__ void __launch_bounds__(kSquareThreads)
    square_sum_total_kernel(const double* sums, int64_t parts, double* result) {
  double sum = 0.0;
  for (int64_t part = threadIdx.x; part < parts; part += kSquareThreads) sum += sums[part];
  sum = block_reduce<kSquareThreads>(sum, Sum());
  if (threadIdx.x == 0) *result = sum;
}

// sums: as many as the arrays have parts; returns what is behind them.
template <typename T>
double* launch_square_sum(const std::vector<Array<T>>& arrays, double* sums, cudaStream_t stream) {
  static_assert(sizeof(ArrayTable<T>) + sizeof(sums) <= kKernelArguments);
  for (size_t first = 0; first < arrays.size(); first += kArrays) {
    ArrayTable<T> table{};
    int64_t parts = 0;
    for (size_t i = 0; i < kArrays; ++i) {
      const bool exists = first + i < arrays.size();
      if (exists) table.arrays[i] = arrays[first + i];
      table.first_part[i] = exists ? parts : std::numeric_limits<int64_t>::max();
      if (exists) parts += arrays[first + i].parts();
    }
    launch(square_sum_kernel<T>, parts, kSquareThreads, stream, table, sums);
    sums += parts;
  }
  return sums;
}

inline void launch_square_sum_total(const double* sums, int64_t parts, double* result, cudaStream_t stream) {
  launch(square_sum_total_kernel, 1, kSquareThreads, stream, sums, parts, result);
}

}  // namespace memkernels::cuda
