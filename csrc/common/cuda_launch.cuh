#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef NDEBUG
  #error "Compile CUDA kernels without NDEBUG: device asserts are what checks labels and other indices."
#endif

namespace memkernels::cuda {

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
