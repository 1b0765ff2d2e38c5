// csrc/simt itself: intrinsics, conversions, shared memory, order of blocks, and how a launch fails.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdlib>
#include <limits>

#include "check.h"
#include "common/cuda_launch.cuh"
#include "common/cuda_shared.cuh"

using namespace memkernels::cuda;

constexpr unsigned int kAll = 0xFFFFFFFFu;

template <typename T>
__global__ void shuffle_kernel(T* output) {
  const int lane = threadIdx.x % warpSize;
  const T value = static_cast<T>(threadIdx.x * 3 + 1);
  T* row = output + int64_t{threadIdx.x} * 6;
  row[0] = __shfl_sync(kAll, value, 5);
  row[1] = __shfl_up_sync(kAll, value, 2);
  row[2] = __shfl_down_sync(kAll, value, 7, 8);
  row[3] = __shfl_xor_sync(kAll, value, 16);
  row[4] = __shfl_sync(kAll, value, 11, 8);
  row[5] = lane % 2 ? __shfl_xor_sync(0xAAAAAAAAu, value, 2) : __shfl_xor_sync(0x55555555u, value, 4);
}

template <typename T>
void test_shuffles(const std::string& type) {
  constexpr int kThreads = 64;
  std::vector<T> output(kThreads * 6);
  launch(shuffle_kernel<T>, 1, kThreads, nullptr, output.data());
  for (int thread = 0; thread < kThreads; ++thread) {
    const int lane = thread % 32;
    const int sources[6] = {5,         lane < 2 ? lane : lane - 2, lane % 8 == 0 ? lane + 7 : lane,
                            lane ^ 16, lane / 8 * 8 + 3,           lane % 2 ? lane ^ 2 : lane ^ 4};
    for (int i = 0; i < 6; ++i) {
      const T wanted = static_cast<T>((thread - lane + sources[i]) * 3 + 1);
      expect(output[thread * 6 + i] == wanted, "shuffle " + std::to_string(i) + " of " + type);
    }
  }
}

__global__ void vote_kernel(unsigned int* output) {
  const unsigned int thread = threadIdx.x;
  unsigned int* row = output + thread * 5;
  row[0] = __ballot_sync(kAll, thread % 3 == 0);
  row[1] = __any_sync(kAll, thread == 40);
  row[2] = __all_sync(kAll, thread < 40);
  __syncwarp();
  if (thread % 32 < 8) {
    row[3] = __ballot_sync(0xFFu, 1);
    row[4] = __all_sync(0xFFu, thread < 40);
  }
}

void test_votes() {
  std::vector<unsigned int> output(64 * 5, 0);
  launch(vote_kernel, 1, 64, nullptr, output.data());
  for (unsigned int thread = 0; thread < 64; ++thread) {
    unsigned int thirds = 0;
    for (unsigned int lane = 0; lane < 32; ++lane) thirds |= unsigned{(thread / 32 * 32 + lane) % 3 == 0} << lane;
    const unsigned int* row = &output[thread * 5];
    expect(row[0] == thirds && row[1] == thread / 32 && row[2] == 1 - thread / 32, "votes of a warp");
    if (thread % 32 < 8) expect(row[3] == 0xFF && row[4] == 1, "votes of eight lanes");
  }
}

__global__ void atomic_kernel(int* integer, float* real, unsigned long long* largest, int* lock, int* taken) {
  atomicAdd(integer, 2);
  atomicAdd(real, 0.5f);
  atomicMax(largest, static_cast<unsigned long long>(blockIdx.x * blockDim.x + threadIdx.x) << 33);
  if (atomicCAS(lock, 0, 1) == 0) atomicAdd(taken, 1);
  if (threadIdx.x == 0 && atomicExch(lock, 7) == 0) atomicAdd(taken, 100);
}

void test_atomics() {
  int integer = 0, lock = 0, taken = 0;
  float real = 0.0f;
  unsigned long long largest = 0;
  launch(atomic_kernel, 4, 32, nullptr, &integer, &real, &largest, &lock, &taken);
  expect(integer == 256 && real == 64.0f && largest == 127ull << 33 && lock == 7 && taken == 1, "atomics");
}

// Every 16-bit pattern survives the way through float32, and every midpoint of two neighbours goes to the even one.
template <typename T, typename ToFloat, typename FromFloat>
void test_conversion(const std::string& type, uint16_t infinity, ToFloat to_float, FromFloat from_float) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t magnitude = bits & 0x7FFF;
    const float value = to_float(T{static_cast<uint16_t>(bits)});
    const uint16_t back = from_float(value).bits;
    if (!expect(magnitude > infinity ? std::isnan(value) && back == 0x7FFF : back == bits, type + " round trip"))
      return;
    if (magnitude >= infinity) continue;
    const bool last = magnitude + 1 == infinity;  // where infinity takes the place of the next power of two
    const double neighbour = last ? 2.0 * value - to_float(T{static_cast<uint16_t>(bits - 1)})
                                  : to_float(T{static_cast<uint16_t>(bits + 1)});
    const double exact = (value + neighbour) / 2;
    const float middle = static_cast<float>(exact);
    if (middle != exact) continue;
    const uint16_t even = bits % 2 == 0 ? bits : bits + 1;
    const bool rounds = from_float(middle).bits == even && from_float(std::nextafter(middle, value)).bits == bits &&
                        from_float(std::nextafter(middle, static_cast<float>(neighbour))).bits == bits + 1;
    if (!expect(rounds, type + " rounds at " + std::to_string(middle))) return;
  }
}

__global__ void poison_kernel(bool* poisoned) {
  struct Row {
    float value[32];
  };
  Row& row = shared_memory<Row>();
  float* dynamic = dynamic_shared_memory<float>();
  poisoned[blockIdx.x * 32 + threadIdx.x] = isnan(row.value[threadIdx.x]) && isnan(dynamic[threadIdx.x]);
  row.value[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
}

void test_shared_memory_is_poisoned() {
  bool poisoned[96] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(3);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 32 * sizeof(float);
  expect(cudaLaunchKernelEx(&config, poison_kernel, poisoned) == cudaSuccess, "launch with dynamic shared memory");
  for (bool value : poisoned) expect(value, "shared memory holds NaN when a block starts");
}

void test_bytes_are_picked() {
  expect(__byte_perm(0x33221100, 0x77665544, 0x5410) == 0x55441100u, "the low halves of two words");
  expect(__byte_perm(0x33221100, 0x77665544, 0x0732) == 0x00773322u, "any bytes of two words");
}

__global__ void empty_kernel() {}

void test_much_dynamic_shared_memory_is_asked_for() {
  cudaLaunchConfig_t config = {};
  config.dynamicSmemBytes = (48 << 10) + 1;
  expect(cudaLaunchKernelEx(&config, empty_kernel) == cudaErrorInvalidValue, "49 KiB without asking");
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  expect(cudaFuncSetAttribute(empty_kernel, attribute, (99 << 10) + 1) == cudaErrorInvalidValue, "more than GPUs have");
  expect(cudaFuncSetAttribute(empty_kernel, attribute, 49 << 10) == cudaSuccess, "49 KiB are asked for");
  expect(cudaLaunchKernelEx(&config, empty_kernel) == cudaSuccess, "49 KiB after asking");
}

__global__ void order_kernel(int* count, int* order) {
  if (threadIdx.x == 0 && threadIdx.y == 0) order[atomicAdd(count, 1)] = blockIdx.x + blockIdx.y * gridDim.x;
}

std::vector<int> order_of_blocks(const char* seed) {
  setenv("MEMKERNELS_SIMT_SEED", seed, 1);
  std::vector<int> order(12, -1);
  int count = 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(4, 3);
  config.blockDim = dim3(4, 2);
  cudaLaunchKernelEx(&config, order_kernel, &count, order.data());
  unsetenv("MEMKERNELS_SIMT_SEED");
  return order;
}

void test_order_of_blocks() {
  const std::vector<int> order = order_of_blocks("1");
  expect(order == order_of_blocks("1") && order != order_of_blocks("2"), "the seed decides the order of blocks");
  uint32_t seen = 0;
  for (int block : order) seen |= 1u << block;
  expect(seen == 0xFFF, "every block runs once");
}

// Each block says that it is there, and waits for all others.
__global__ void meeting_kernel(int* present, int failing) {
  assert(static_cast<int>(blockIdx.x) != failing && "no such block");
  if (threadIdx.x == 0) atomicAdd(present, 1);
  while (atomicAdd(present, 0) < static_cast<int>(gridDim.x)) __nanosleep(32);
  __syncthreads();
}

cudaError_t launch_meeting(unsigned int blocks, int failing) {
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(32);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  int present = 0;
  return cudaLaunchKernelEx(&config, meeting_kernel, &present, failing);
}

void test_blocks_of_a_cooperative_launch_run_at_once() {
  expect(launch_meeting(8, -1) == cudaSuccess, "blocks that wait for each other");
  expect_kernel_error("block (2, 0, 0), thread", [] { launch_meeting(4, 2); });
  expect(launch_meeting(9, -1) == cudaErrorCooperativeLaunchTooLarge, "more blocks than run at once");
}

__global__ void early_exit_kernel(int* output) {
  if (threadIdx.x % 2 == 0) return;
  __syncthreads();
  const int sum = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 2);
  __syncthreads();
  output[threadIdx.x] = sum;
}

void test_threads_may_leave_early() {
  int output[64] = {};
  launch(early_exit_kernel, 1, 64, nullptr, output);
  for (int thread = 1; thread < 64; thread += 2) expect(output[thread] == (thread ^ 2), "threads that stay still meet");
}

__global__ void assert_kernel(int thread) {
  assert(static_cast<int>(threadIdx.x) != thread && "no such thread");
  __syncthreads();
  __syncwarp();
}
__global__ void throw_kernel() {
  if (threadIdx.x == 3) throw std::runtime_error("thrown");
  __syncwarp();
}
__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __syncwarp(kAll >> (threadIdx.x == 40));
}
__global__ void missing_lane_kernel() {
  __shfl_sync(0xFFu << (threadIdx.x / 8 * 8), 0, 9);
}
__global__ void unnamed_lane_kernel() {
  __syncwarp(1);
}

void test_failures() {
  for (int repeat = 0; repeat < 20; ++repeat) {
    expect_kernel_error("block (0, 0, 0), thread (17, 0, 0): device assertion",
                        [] { launch(assert_kernel, 1, 64, nullptr, 17); });
  }
  expect_kernel_error("no such thread", [] { launch(assert_kernel, 5, 64, nullptr, 0); });
  expect_kernel_error("thrown", [] { launch(throw_kernel, 2, 64, nullptr); });
  expect_kernel_error("deadlock", [] { launch(divergent_barrier_kernel, 2, 64, nullptr); });
  expect_kernel_error("does not take part", [] { launch(missing_lane_kernel, 1, 32, nullptr); });
  expect_kernel_error("does not name", [] { launch(unnamed_lane_kernel, 1, 32, nullptr); });
  std::string refusal;
  try {
    launch(unnamed_lane_kernel, 1, 1025, nullptr);
  } catch (const std::runtime_error& error) {
    refusal = error.what();
  }
  expect(refusal.find("invalid configuration") != std::string::npos, "a block of 1025 threads is refused");
  expect(kernel_error([] { launch(assert_kernel, 2, 64, nullptr, -1); }) == "", "a good launch after failures");
}

int main() {
  test_shuffles<int>("int");
  test_shuffles<float>("float");
  test_shuffles<double>("double");
  test_shuffles<long long>("long long");
  test_votes();
  test_atomics();
  test_conversion<__half>("half", 0x7C00, __half2float, __float2half_rn);
  test_conversion<__nv_bfloat16>("bfloat16", 0x7F80, __bfloat162float, __float2bfloat16_rn);
  test_shared_memory_is_poisoned();
  test_bytes_are_picked();
  test_much_dynamic_shared_memory_is_asked_for();
  test_order_of_blocks();
  test_blocks_of_a_cooperative_launch_run_at_once();
  test_threads_may_leave_early();
  test_failures();
  return failures > 0;
}
