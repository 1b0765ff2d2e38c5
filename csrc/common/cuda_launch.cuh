#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef NDEBUG
  #error "Compile CUDA kernels without NDEBUG: device asserts are what checks labels and other indices."
#endif

namespace memkernels::cuda {

// Bytes of a kernel's arguments, on every CUDA.
constexpr size_t kKernelArguments = 4096;

// The i with first[i] <= at < first[i + 1], of parts that several owners have in turn; N a power of two, first[0] = 0.
template <int N>
__device__ __forceinline__ int owner_of(const int64_t (&first)[N], int64_t at) {
  static_assert((N & (N - 1)) == 0);
  int owner = 0;
#pragma unroll
  for (int step = N / 2; step > 0; step /= 2) owner += at >= first[owner + step] ? step : 0;
  return owner;
}

// Launches `blocks` blocks of `threads` threads; none if there are no blocks. Raises std::runtime_error when CUDA
// refuses the launch.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, Args... args) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("kernel launch of " + std::to_string(blocks) + " blocks; the most is 2^31 - 1");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned int>(blocks));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) throw std::runtime_error(std::string("kernel launch failed: ") + cudaGetErrorString(error));
}

}  // namespace memkernels::cuda
