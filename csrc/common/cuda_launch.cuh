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

// Dynamic shared memory of a block that needs no leave of CUDA, and the most that a kernel takes: what every GPU from
// sm_80 on has, with some left for static shared memory.
constexpr int kPlainSharedBytes = 48 << 10;
constexpr int kMostSharedBytes = 96 << 10;

inline void check_launch(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("kernel launch failed: ") + cudaGetErrorString(error));
}

// Launches `teams` teams of `blocks` blocks (cuda_team.cuh) of `threads` threads with `shared_bytes` of dynamic shared
// memory; none if there are no teams. Of teams of several blocks all are on the GPU together. Raises
// std::runtime_error when CUDA refuses the launch, as it does where they are more than it holds.
template <typename... Params, typename... Args>
void launch_teams(void (*kernel)(Params...), int64_t teams, int blocks, int threads, int shared_bytes,
                  cudaStream_t stream, Args... args) {
  if (teams == 0) return;
  if (teams > INT32_MAX) {
    throw std::runtime_error("kernel launch of " + std::to_string(teams) + " blocks; the most is 2^31 - 1");
  }
  if (shared_bytes > kPlainSharedBytes) {
    // The same for all launches, of which some may be on their way from other threads.
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned int>(teams), static_cast<unsigned int>(blocks));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = blocks > 1 ? 1 : 0;
  check_launch(cudaLaunchKernelEx(&config, kernel, args...));
}

// `blocks` blocks that need nothing of each other.
template <typename... Params, typename... Args>
void launch_with_shared(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                        Args... args) {
  launch_teams(kernel, blocks, 1, threads, shared_bytes, stream, args...);
}

// The same without dynamic shared memory.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, Args... args) {
  launch_with_shared(kernel, blocks, threads, 0, stream, args...);
}

}  // namespace memkernels::cuda
