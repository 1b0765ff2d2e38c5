#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_shared.cuh"

namespace memkernels::cuda {

constexpr unsigned int kFullWarp = 0xFFFFFFFFu;

struct Sum {
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The magnitude of a value as an integer, by which a NaN is above infinity.
__device__ __forceinline__ uint32_t magnitude_bits(float value) {
  return __float_as_uint(value) & 0x7FFFFFFFu;
}

struct Larger {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

template <int N>
__device__ __forceinline__ uint32_t largest_of(const float (&values)[N]) {
  uint32_t largest = 0;
#pragma unroll
  for (float value : values) largest = Larger()(largest, magnitude_bits(value));
  return largest;
}

// The number to subtract from values of which `max` is the maximum, before exp: -inf only if all of them are, and then
// exp(-inf - 0) is the 0 that is wanted where exp(-inf - -inf) would be NaN.
__device__ __forceinline__ float exp_shift(float max) {
  return max == -INFINITY ? 0.0f : max;
}

// Online softmax: log(sum of exp(values)) = max + log(sum). No values yet: {-inf, 0}.
struct SoftmaxState {
  float max;
  float sum;  // of exp(value - max)
};

struct MergeSoftmax {
  __device__ __forceinline__ SoftmaxState operator()(SoftmaxState a, SoftmaxState b) const {
    const float max = fmaxf(a.max, b.max);
    const float shift = exp_shift(max);
    return {max, a.sum * expf(a.max - shift) + b.sum * expf(b.max - shift)};
  }
};

// __shfl_xor_sync for any struct of 32-bit words.
template <typename V>
__device__ __forceinline__ V shuffle_xor(V value, int lane_mask) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) % 4 == 0);
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(kFullWarp, word, lane_mask);
  memcpy(&value, words, sizeof(V));
  return value;
}

// Combines over the first `Lanes` lanes (a power of two); combine must be commutative, so that every lane gets the
// same bits.
template <int Lanes = 32, typename V, typename Combine>
__device__ __forceinline__ V warp_reduce(V value, Combine combine) {
#pragma unroll
  for (int lane_mask = Lanes / 2; lane_mask > 0; lane_mask /= 2) value = combine(value, shuffle_xor(value, lane_mask));
  return value;
}

template <typename V, int Warps>
struct WarpResults {
  V value[Warps];
};

// Combines over a block of `Threads` threads (a power of two of warps), in an order that depends on nothing else.
// Every thread gets the result.
template <int Threads, typename V, typename Combine>
__device__ __forceinline__ V block_reduce(V value, Combine combine) {
  static_assert(Threads % 32 == 0 && Threads <= 1024 && (Threads & (Threads - 1)) == 0);
  constexpr int kWarps = Threads / 32;
  value = warp_reduce(value, combine);
  if constexpr (kWarps > 1) {
    WarpResults<V, kWarps>& results = shared_memory<WarpResults<V, kWarps>>();
    if (threadIdx.x % 32 == 0) results.value[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_reduce<kWarps>(results.value[threadIdx.x % kWarps], combine);
    __syncthreads();  // the next reduction writes the same memory
  }
  return value;
}

}  // namespace memkernels::cuda
