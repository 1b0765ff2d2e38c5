#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "block.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "too many blocks in cooperative launch";
  }
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

union cudaLaunchAttributeValue {
  int cooperative;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned int numAttrs = 0;
};

namespace memkernels::simt {

// Bytes of dynamic shared memory that a kernel may have: 48 KiB, or what was asked for it, up to the 99 KiB of the
// smallest GPU.
constexpr size_t kPlainDynamicBytes = 48 << 10;
constexpr int kMostDynamicBytes = 99 << 10;

// Blocks of a cooperative launch, one a multiprocessor.
constexpr int64_t kMultiprocessors = 8;

inline size_t& dynamic_bytes_of(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.try_emplace(kernel, kPlainDynamicBytes).first->second;
}

inline uint3 unflatten(int64_t index, dim3 extent) {
  const int64_t row = index / extent.x;
  return {static_cast<unsigned int>(index % extent.x), static_cast<unsigned int>(row % extent.y),
          static_cast<unsigned int>(row / extent.y)};
}

inline std::vector<int64_t> block_order(int64_t blocks) {
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), int64_t{0});
  const char* seed = std::getenv("MEMKERNELS_SIMT_SEED");
  std::shuffle(order.begin(), order.end(), std::mt19937_64(seed ? std::strtoull(seed, nullptr, 10) : 0));
  return order;
}

inline bool is_cooperative(const cudaLaunchConfig_t& config) {
  return config.numAttrs > 0 && config.attrs[0].id == cudaLaunchAttributeCooperative &&
         config.attrs[0].val.cooperative != 0;
}

// Runs body() once per thread of the grid, on one pool of threads that takes the blocks in turn, or in a cooperative
// launch all of them at once.
inline void launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const std::vector<int64_t> order = block_order(int64_t{gridDim.x} * gridDim.y * gridDim.z);
  const int at_once = is_cooperative(config) ? static_cast<int>(order.size()) : 1;

  Launch launch;
  std::deque<Block> blocks;
  for (int i = 0; i < at_once; ++i) blocks.emplace_back(threads, config.dynamicSmemBytes, launch);
  size_t next = 0;  // 1 past the blocks that run
  bool done = false;
  auto advance = [&]() noexcept {
    done = next == order.size() || launch.failed;
    if (done) return;
    next += at_once;
    for (Block& block : blocks) block.reset();
  };
  std::barrier turn(at_once * threads, advance);

  {
    std::vector<std::jthread> pool;
    for (int i = 0; i < at_once * threads; ++i) {
      pool.emplace_back([&, place = i / threads, thread = i % threads] {
        Block& block = blocks[place];
        current_block = &block;
        current_thread = thread;
        threadIdx = unflatten(thread, blockDim);
        for (turn.arrive_and_wait(); !done; turn.arrive_and_wait()) {
          blockIdx = unflatten(order[next - at_once + place], gridDim);
          block.run(thread, body);
        }
      });
    }
  }
  for (const Block& block : blocks) {
    if (block.failed() && !block.message().empty()) throw KernelError(block.message());
  }
}

}  // namespace memkernels::simt

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > memkernels::simt::kMostDynamicBytes) return cudaErrorInvalidValue;
  memkernels::simt::dynamic_bytes_of(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (int64_t{grid.x} * grid.y * grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > memkernels::simt::dynamic_bytes_of(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  if (memkernels::simt::is_cooperative(*config) &&
      int64_t{grid.x} * grid.y * grid.z > memkernels::simt::kMultiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  memkernels::simt::launch(*config, [&] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}
