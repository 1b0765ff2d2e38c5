// Tokens to their experts and back. The plan is a counting sort of (token, choice) pairs by expert in three kernels:
// count, scan, place. It is stable and has no atomics, so that it is the same on every run, and the same as that of
// csrc/cpu/moe_plan.cpp. A token's choices are neighbours, k each or as many as token_offsets says; choice p of token t
// has row r = row_of_pair[p] of the grouped rows, or none (-1):
//
//   dispatch:     x_grouped[r] = w[p] x[t]
//   combine:      y[t] = sum over t's p of w[p] y_grouped[r]
//   combine_bwd:  dy_grouped[r] = w[p] dy[t], dw[p] = <dy[t], y_grouped[r]>
//
// Sums are float32, in the order of p. Every index is asserted before it is an address.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

#include "../common/cuda_convert.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/cuda_pack.cuh"
#include "../common/cuda_reduce.cuh"
#include "../common/cuda_shared.cuh"

namespace memkernels::cuda {

constexpr int kPlanThreads = 256;
constexpr int kPairsPerThread = 4;
constexpr int kPairsPerBlock = kPlanThreads * kPairsPerThread;
constexpr int kRowThreads = 128;
// Blocks that write the rows which belong to no expert; how many those are is known on the device alone.
constexpr int64_t kTailBlocks = 64;

inline int64_t plan_blocks(int64_t pairs) {
  return (pairs + kPairsPerBlock - 1) / kPairsPerBlock;
}

struct BlockIds {
  int value[kPairsPerBlock];
};

// The ids of a block's pairs; num_groups, which is no group, beyond the last pair.
template <typename Id>
__device__ __forceinline__ BlockIds& load_ids(const Id* ids, int64_t pairs, int num_groups) {
  BlockIds& held = shared_memory<BlockIds>();
  const int64_t first = int64_t{blockIdx.x} * kPairsPerBlock;
  for (int i = threadIdx.x; i < kPairsPerBlock; i += kPlanThreads) {
    int id = num_groups;
    if (first + i < pairs) {
      const Id given = ids[first + i];
      assert(given >= 0 && given < num_groups && "expert id out of range");
      id = static_cast<int>(given);
    }
    held.value[i] = id;
  }
  __syncthreads();
  return held;
}

// before[block, group] = the pairs of the group in the block. Reads ids once; a thread counts a group, all of them
// reading the same id at a time.
template <typename Id>
__global__ void __launch_bounds__(kPlanThreads)
    moe_count_kernel(const Id* ids, int64_t pairs, int num_groups, int32_t* before) {
  const BlockIds& held = load_ids(ids, pairs, num_groups);
  for (int group = threadIdx.x; group < num_groups; group += kPlanThreads) {
    int32_t count = 0;
#pragma unroll 8
    for (int i = 0; i < kPairsPerBlock; ++i) count += held.value[i] == group;
    before[int64_t{blockIdx.x} * num_groups + group] = count;
  }
}

struct ScanValues {
  int32_t value[kPlanThreads];
};

// The sum of `value` over the threads up to this one.
__device__ __forceinline__ int32_t inclusive_scan(int32_t value) {
  ScanValues& held = shared_memory<ScanValues>();
  held.value[threadIdx.x] = value;
  __syncthreads();
  for (int distance = 1; distance < kPlanThreads; distance *= 2) {
    const int32_t added = static_cast<int>(threadIdx.x) >= distance ? held.value[threadIdx.x - distance] : 0;
    __syncthreads();
    value += added;
    held.value[threadIdx.x] = value;
    __syncthreads();
  }
  return value;
}

struct ScanTotal {
  int32_t value;
};

// One block. before[block, group] becomes the pairs of the group in earlier blocks; counts[group] their number in all;
// offsets the first rows of the experts, each of which takes `capacity` at most.
static __global__ void __launch_bounds__(kPlanThreads)
    moe_scan_kernel(int64_t blocks, int num_groups, int64_t capacity, int32_t* before, int32_t* counts,
                    int32_t* offsets) {
  const int experts = num_groups - 1;
  ScanTotal& end = shared_memory<ScanTotal>();
  int32_t first_row = 0;
  for (int first = 0; first < num_groups; first += kPlanThreads) {
    const int group = first + static_cast<int>(threadIdx.x);
    int32_t total = 0;
    if (group < num_groups) {
      constexpr int kInFlight = 4;
      for (int64_t block = 0; block < blocks; block += kInFlight) {
        int32_t count[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          count[i] = block + i < blocks ? before[(block + i) * num_groups + group] : 0;
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (block + i < blocks) before[(block + i) * num_groups + group] = total;
          total += count[i];
        }
      }
      counts[group] = total;
    }
    const int32_t rows = group < experts ? (total < capacity ? total : static_cast<int32_t>(capacity)) : 0;
    const int32_t upto = inclusive_scan(rows);
    if (group < experts) offsets[group] = first_row + upto - rows;
    if (threadIdx.x == kPlanThreads - 1) end.value = upto;
    __syncthreads();
    first_row += end.value;
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[experts] = first_row;
}

// row_of_pair and pair_of_row. A pair's place in its group: the pairs of the group in earlier blocks, and in this one
// before it.
template <typename Id>
__global__ void __launch_bounds__(kPlanThreads)
    moe_place_kernel(const Id* ids, int64_t pairs, int num_groups, int64_t capacity, int64_t rows,
                     const int32_t* before, const int32_t* offsets, int32_t* row_of_pair, int32_t* pair_of_row) {
  const BlockIds& held = load_ids(ids, pairs, num_groups);
  const int thread = static_cast<int>(threadIdx.x);
  int id[kPairsPerThread], place[kPairsPerThread];
#pragma unroll
  for (int n = 0; n < kPairsPerThread; ++n) {
    id[n] = held.value[n * kPlanThreads + thread];
    place[n] = 0;
  }
#pragma unroll 4
  for (int i = 0; i < kPairsPerBlock; ++i) {
    const int other = held.value[i];
#pragma unroll
    for (int n = 0; n < kPairsPerThread; ++n) place[n] += i < n * kPlanThreads + thread && other == id[n];
  }
  const int64_t block = blockIdx.x;
#pragma unroll
  for (int n = 0; n < kPairsPerThread; ++n) {
    const int64_t pair = block * kPairsPerBlock + n * kPlanThreads + thread;
    if (pair >= pairs) continue;
    const int64_t in_group = int64_t{before[block * num_groups + id[n]]} + place[n];
    const bool kept = id[n] < num_groups - 1 && in_group < capacity;
    const int64_t row = kept ? offsets[id[n]] + in_group : -1;
    row_of_pair[pair] = static_cast<int32_t>(row);
    if (kept) pair_of_row[row] = static_cast<int32_t>(pair);
  }
  const int64_t step = int64_t{gridDim.x} * kPlanThreads;
  for (int64_t row = offsets[num_groups - 1] + block * kPlanThreads + thread; row < rows; row += step) {
    pair_of_row[row] = -1;
  }
}

// before: plan_blocks(pairs) * (experts + 1) of scratch. rows: of pair_of_row. Reads ids twice and before three times;
// writes row_of_pair, pair_of_row, before twice.
template <typename Id>
void launch_moe_plan(const Id* ids, int64_t pairs, int64_t experts, int64_t capacity, int64_t rows, int32_t* before,
                     int32_t* row_of_pair, int32_t* pair_of_row, int32_t* offsets, int32_t* counts,
                     cudaStream_t stream) {
  const int64_t blocks = plan_blocks(pairs);
  const int num_groups = static_cast<int>(experts + 1);
  launch(moe_count_kernel<Id>, blocks, kPlanThreads, stream, ids, pairs, num_groups, before);
  launch(moe_scan_kernel, 1, kPlanThreads, stream, blocks, num_groups, capacity, before, counts, offsets);
  launch(moe_place_kernel<Id>, blocks, kPlanThreads, stream, ids, pairs, num_groups, capacity, rows,
         static_cast<const int32_t*>(before), static_cast<const int32_t*>(offsets), row_of_pair, pair_of_row);
}

// Rows of tokens and of experts, in packs of Size elements.
struct MoeRows {
  const int32_t* row_of_pair;  // [pairs]
  const int32_t* end;          // the first grouped row that belongs to no expert
  int64_t tokens;
  int64_t choices;  // of a token, unless there are token_offsets
  int64_t rows;
  int64_t packs;                           // of a row
  const int32_t* token_offsets = nullptr;  // [tokens + 1]
  int64_t pairs = 0;                       // beside token_offsets

  // The choices of a token are first(token) to first(token + 1).
  __device__ __forceinline__ int64_t first(int64_t token) const {
    if (token_offsets == nullptr) return token * choices;
    const int64_t pair = token_offsets[token];
    assert(pair >= 0 && pair <= pairs && "token_offsets out of range");
    return pair;
  }

  // The grouped row of a choice, -1 for none.
  __device__ __forceinline__ int64_t of(int64_t pair) const {
    const int64_t row = row_of_pair[pair];
    assert(row >= -1 && row < rows && "row out of range");
    return row;
  }
};

// The work of the blocks beyond the tokens'.
template <typename T, int Size>
__device__ __forceinline__ void zero_tail(const MoeRows& of, Pack<T, Size>* grouped) {
  const int64_t end = *of.end;
  assert(end >= 0 && end <= of.rows && "offsets out of range");
  for (int64_t row = end + (int64_t{blockIdx.x} - of.tokens); row < of.rows; row += kTailBlocks) {
    for (int64_t i = threadIdx.x; i < of.packs; i += kRowThreads) grouped[row * of.packs + i] = {};
  }
}

// The same of the choices that belong to no token.
__device__ __forceinline__ void zero_choices(const MoeRows& of, float* dweights) {
  if (of.token_offsets == nullptr) return;
  const int64_t block = int64_t{blockIdx.x} - of.tokens;
  for (int64_t pair = of.first(of.tokens) + block * kRowThreads + threadIdx.x; pair < of.pairs;
       pair += kTailBlocks * kRowThreads) {
    dweights[pair] = 0.0f;
  }
}

template <typename T, int Size>
__device__ __forceinline__ Pack<T, Size> scaled(Pack<T, Size> pack, float factor) {
#pragma unroll
  for (T& value : pack.value) value = from_float<T>(to_float(value) * factor);
  return pack;
}

// A block holds a token. Reads x once and writes x_grouped once.
template <typename T, int Size, bool Weighted>
__global__ void __launch_bounds__(kRowThreads)
    moe_dispatch_kernel(MoeRows of, const Pack<T, Size>* x, const float* weights, Pack<T, Size>* grouped) {
  const int64_t token = blockIdx.x;
  if (token >= of.tokens) return zero_tail(of, grouped);
  const int64_t first = of.first(token), last = of.first(token + 1);
  for (int64_t i = threadIdx.x; i < of.packs; i += kRowThreads) {
    const Pack<T, Size> pack = x[token * of.packs + i];
    for (int64_t pair = first; pair < last; ++pair) {
      const int64_t row = of.of(pair);
      if (row < 0) continue;
      if constexpr (Weighted) {
        grouped[row * of.packs + i] = scaled(pack, weights[pair]);
      } else {
        grouped[row * of.packs + i] = pack;
      }
    }
  }
}

// Reads the rows of y_grouped that belong to a token once and writes y once.
template <typename T, int Size, bool Weighted>
__global__ void __launch_bounds__(kRowThreads)
    moe_combine_kernel(MoeRows of, const Pack<T, Size>* grouped, const float* weights, Pack<T, Size>* y) {
  const int64_t token = blockIdx.x, first = of.first(token), last = of.first(token + 1);
  for (int64_t i = threadIdx.x; i < of.packs; i += kRowThreads) {
    float sum[Size] = {};
    for (int64_t pair = first; pair < last; ++pair) {
      const int64_t row = of.of(pair);
      if (row < 0) continue;
      const float factor = Weighted ? weights[pair] : 1.0f;
      const Pack<T, Size> pack = grouped[row * of.packs + i];
#pragma unroll
      for (int n = 0; n < Size; ++n) sum[n] += to_float(pack.value[n]) * factor;
    }
    Pack<T, Size> out;
#pragma unroll
    for (int n = 0; n < Size; ++n) out.value[n] = from_float<T>(sum[n]);
    y[token * of.packs + i] = out;
  }
}

constexpr int kChoicesAtOnce = 4;
constexpr int kBlocks = 8;  // on a multiprocessor, so that registers are not spent on addresses

// Reads dy once for every kChoicesAtOnce choices of a token, and y_grouped once; writes dy_grouped once.
template <typename T, int Size>
__global__ void __launch_bounds__(kRowThreads, kBlocks)
    moe_combine_bwd_kernel(MoeRows of, const Pack<T, Size>* dy, const Pack<T, Size>* grouped, const float* weights,
                           Pack<T, Size>* dgrouped, float* dweights) {
  const int64_t token = blockIdx.x;
  if (token >= of.tokens) {
    zero_choices(of, dweights);
    return zero_tail(of, dgrouped);
  }
  constexpr int kInFlight = 2;  // of y_grouped, beside dy
  const int64_t last = of.first(token + 1);
  for (int64_t first = of.first(token); first < last; first += kChoicesAtOnce) {
    int32_t row[kChoicesAtOnce];
    float factor[kChoicesAtOnce], product[kChoicesAtOnce] = {};
#pragma unroll
    for (int n = 0; n < kChoicesAtOnce; ++n) {
      row[n] = first + n < last ? static_cast<int32_t>(of.of(first + n)) : -1;
      factor[n] = row[n] >= 0 ? weights[first + n] : 0.0f;
    }
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < of.packs; i += kRowThreads) {
      const Pack<T, Size> grad = dy[token * of.packs + i];
#pragma unroll
      for (int begin = 0; begin < kChoicesAtOnce; begin += kInFlight) {
        Pack<T, Size> value[kInFlight];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
          if (row[begin + n] >= 0) value[n] = grouped[row[begin + n] * of.packs + i];
        }
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
          if (row[begin + n] < 0) continue;
          dgrouped[row[begin + n] * of.packs + i] = scaled(grad, factor[begin + n]);
#pragma unroll
          for (int e = 0; e < Size; ++e) product[begin + n] += to_float(grad.value[e]) * to_float(value[n].value[e]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kChoicesAtOnce; ++n) {
      if (first + n >= last) break;
      const float total = block_reduce<kRowThreads>(product[n], Sum());
      if (threadIdx.x == 0) dweights[first + n] = total;
    }
  }
}

template <typename T, int Size>
const Pack<T, Size>* packs_of(const T* elements) {
  return reinterpret_cast<const Pack<T, Size>*>(elements);
}
template <typename T, int Size>
Pack<T, Size>* packs_of(T* elements) {
  return reinterpret_cast<Pack<T, Size>*>(elements);
}

// `of.packs` is the size of a row in elements; weights may be null: 1.
template <typename T>
void launch_moe_dispatch(MoeRows of, const T* x, const float* weights, T* grouped, cudaStream_t stream) {
  dispatch_pack<T>(
      of.packs,
      [&]<int Size>(std::integral_constant<int, Size>) {
        of.packs /= Size;
        const auto kernel =
            weights == nullptr ? moe_dispatch_kernel<T, Size, false> : moe_dispatch_kernel<T, Size, true>;
        launch(kernel, of.tokens + kTailBlocks, kRowThreads, stream, of, packs_of<T, Size>(x), weights,
               packs_of<T, Size>(grouped));
      },
      x, grouped);
}

template <typename T>
void launch_moe_combine(MoeRows of, const T* grouped, const float* weights, T* y, cudaStream_t stream) {
  dispatch_pack<T>(
      of.packs,
      [&]<int Size>(std::integral_constant<int, Size>) {
        of.packs /= Size;
        const auto kernel = weights == nullptr ? moe_combine_kernel<T, Size, false> : moe_combine_kernel<T, Size, true>;
        launch(kernel, of.tokens, kRowThreads, stream, of, packs_of<T, Size>(grouped), weights, packs_of<T, Size>(y));
      },
      grouped, y);
}

template <typename T>
void launch_moe_combine_bwd(MoeRows of, const T* dy, const T* grouped, const float* weights, T* dgrouped,
                            float* dweights, cudaStream_t stream) {
  dispatch_pack<T>(
      of.packs,
      [&]<int Size>(std::integral_constant<int, Size>) {
        of.packs /= Size;
        launch(moe_combine_bwd_kernel<T, Size>, of.tokens + kTailBlocks, kRowThreads, stream, of, packs_of<T, Size>(dy),
               packs_of<T, Size>(grouped), weights, packs_of<T, Size>(dgrouped), dweights);
      },
      dy, grouped, dgrouped);
}

}  // namespace memkernels::cuda
