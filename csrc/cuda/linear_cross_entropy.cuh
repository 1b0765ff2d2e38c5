// Row kernels of linear cross-entropy, for logits that arrive one tile of the vocabulary at a time.
//
// A tile holds columns [vocab_start, vocab_start + cols) of each row. With x a logit, z = softcap * tanh(x / softcap)
// (z = x without softcap), lse = log(sum of exp(z)) over the row, y the target and s the label smoothing:
//
//   loss = lse - (1 - s) * z_y - s / vocab_size * sum of z + z_loss * lse^2
//
// cross_entropy_stats reads a tile once and merges it into the state of its rows; cross_entropy_grad reads it once and
// overwrites it by dloss/dx. A probability is exp(z - row_max) / row_sum: lse, rounded where the logits are large,
// would put its error into every one of them. Arithmetic is float32, the order of every sum is fixed, nothing
// synchronises with the host.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <type_traits>

#include "../common/cuda_convert.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/cuda_pack.cuh"
#include "../common/cuda_reduce.cuh"

namespace memkernels::cuda {

template <typename T>
struct LogitsTile {
  T* logits;  // [rows, cols], rows `row_stride` elements apart, at any alignment of T
  int64_t row_stride;
  const int64_t* target;  // [rows], ids of the whole vocabulary, or ignore_index
  int64_t rows;
  int64_t cols;
  int64_t vocab_start;
  int64_t vocab_size;
  int64_t ignore_index;
  float softcap;

  // The column of a row's target, outside [0, cols) where the tile does not hold it.
  __device__ __forceinline__ int64_t target_column(int64_t row) const {
    const int64_t label = target[row];
    assert((label == ignore_index || (label >= 0 && label < vocab_size)) && "target out of range");
    return label == ignore_index ? -1 : label - vocab_start;
  }
};

// How the threads of a block share rows: Threads per row, Rows per block.
template <int Threads, int Rows>
struct RowShape {
  static_assert(Rows == 1 || Threads == 32, "a row is reduced by one warp or by the whole block");
  static constexpr int threads = Threads;
  static constexpr int rows = Rows;
  static constexpr int block = Threads * Rows;
};

template <bool Softcap>
__device__ __forceinline__ float capped(float logit, float softcap, float inverse_softcap) {
  return Softcap ? softcap * tanhf(logit * inverse_softcap) : logit;
}

// __expf errs by |x| * 2^-24, which e^x outweighs for the negative x of a softmax, and by nothing a 16-bit logit shows.
template <typename T>
__device__ __forceinline__ float exp_for(float x) {
  return std::is_same_v<T, float> ? expf(x) : __expf(x);
}

struct RowStats {
  SoftmaxState softmax;
  float logit_sum;
};

struct MergeRowStats {
  __device__ __forceinline__ RowStats operator()(RowStats a, RowStats b) const {
    return {MergeSoftmax()(a.softmax, b.softmax), a.logit_sum + b.logit_sum};
  }
};

// Reads rows * cols logits once; a few words per row besides.
template <typename T, typename Shape, bool Softcap>
__global__ void __launch_bounds__(Shape::block)
    cross_entropy_stats_kernel(LogitsTile<const T> tile, float* row_max, float* row_sum, float* target_logit,
                               float* logit_sum) {
  const int64_t row = int64_t{blockIdx.x} * Shape::rows + threadIdx.x / Shape::threads;
  if (row >= tile.rows) return;
  const int thread = threadIdx.x % Shape::threads;
  const float inverse_softcap = 1.0f / tile.softcap;
  const T* logits = tile.logits + row * tile.row_stride;

  RowStats stats = {{-INFINITY, 0.0f}, 0.0f};
  for_each_pack(logits, tile.cols, thread, Shape::threads, [&](const auto& source, int64_t) {
    const auto pack = source;
    constexpr int kSize = std::remove_const_t<decltype(pack)>::size;
    float z[kSize];
    float max = stats.softmax.max;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      z[i] = capped<Softcap>(to_float(pack.value[i]), tile.softcap, inverse_softcap);
      max = fmaxf(max, z[i]);
    }
    const float shift = exp_shift(max);
    float sum = stats.softmax.sum * exp_for<T>(stats.softmax.max - shift);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sum += exp_for<T>(z[i] - shift);
      stats.logit_sum += z[i];
    }
    stats.softmax = {max, sum};
  });

  if constexpr (Shape::threads == 32) {
    stats = warp_reduce(stats, MergeRowStats());
  } else {
    stats = block_reduce<Shape::threads>(stats, MergeRowStats());
  }

  if (thread == 0) {
    const SoftmaxState merged = MergeSoftmax()({row_max[row], row_sum[row]}, stats.softmax);
    row_max[row] = merged.max;
    row_sum[row] = merged.sum;
    logit_sum[row] += stats.logit_sum;
    const int64_t column = tile.target_column(row);
    if (column >= 0 && column < tile.cols) {
      target_logit[row] = capped<Softcap>(to_float(logits[column]), tile.softcap, inverse_softcap);
    }
  }
}

// Reads and writes rows * cols logits once; rows that are ignored are only written.
template <typename T, typename Shape, bool Softcap>
__global__ void __launch_bounds__(Shape::block)
    cross_entropy_grad_kernel(LogitsTile<T> tile, const float* row_max, const float* row_sum, const float* grad_loss,
                              float label_smoothing, float z_loss) {
  const int64_t row = int64_t{blockIdx.x} * Shape::rows + threadIdx.x / Shape::threads;
  if (row >= tile.rows) return;
  const int thread = threadIdx.x % Shape::threads;
  const float inverse_softcap = 1.0f / tile.softcap;
  T* logits = tile.logits + row * tile.row_stride;

  if (tile.target[row] == tile.ignore_index) {
    for_each_pack(logits, tile.cols, thread, Shape::threads, [](auto& target, int64_t) { target = {}; });
    return;
  }

  const int64_t target_column = tile.target_column(row);
  const float max = row_max[row];
  const float sum = row_sum[row];
  const float shift = exp_shift(max);
  const float grad = grad_loss[row];
  // A row of nothing but -inf has lse -inf and every probability 0, which no z_loss may turn into NaN.
  const float probability_scale = max == -INFINITY ? 0.0f : grad * (1.0f + 2.0f * z_loss * (max + logf(sum))) / sum;
  const float target_grad = grad * (1.0f - label_smoothing);
  const float smoothing_grad = grad * (label_smoothing / static_cast<float>(tile.vocab_size));

  for_each_pack(logits, tile.cols, thread, Shape::threads, [&](auto& target, int64_t column) {
    auto pack = target;
#pragma unroll
    for (int i = 0; i < pack.size; ++i) {
      const float logit = to_float(pack.value[i]);
      const float tanh = Softcap ? tanhf(logit * inverse_softcap) : 0.0f;
      const float z = Softcap ? tile.softcap * tanh : logit;
      float result = probability_scale * exp_for<T>(z - shift) - smoothing_grad;
      if (column + i == target_column) result -= target_grad;
      pack.value[i] = from_float<T>(Softcap ? result * (1.0f - tanh * tanh) : result);
    }
    target = pack;
  });
}

// Calls body(RowShape, has_softcap) with both as types. A row gets so many threads that each has a few packs to load:
// short rows one warp, long ones a whole block.
template <typename Body>
void dispatch_row_kernel(int64_t cols, float softcap, Body body) {
  const auto with_shape = [&](auto shape) {
    if (softcap > 0.0f) {
      body(shape, std::true_type());
    } else {
      body(shape, std::false_type());
    }
  };
  if (cols <= 1024) {
    with_shape(RowShape<32, 4>());
  } else if (cols <= 8192) {
    with_shape(RowShape<128, 1>());
  } else {
    with_shape(RowShape<512, 1>());
  }
}

// Merges a tile into the state of its rows, all float32 [rows]: row_max (starts at -inf), row_sum of exp(z - row_max)
// (starts at 0), logit_sum of z (starts at 0), and target_logit, z of the target, written only where the tile holds it.
// lse = row_max + log(row_sum) once every tile is in. Ignored rows are merged like others.
template <typename T>
void launch_cross_entropy_stats(const T* logits, int64_t row_stride, const int64_t* target, int64_t rows, int64_t cols,
                                int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, float softcap,
                                float* row_max, float* row_sum, float* target_logit, float* logit_sum,
                                cudaStream_t stream) {
  const LogitsTile<const T> tile = {logits,      row_stride, target,       rows,   cols,
                                    vocab_start, vocab_size, ignore_index, softcap};
  dispatch_row_kernel(cols, softcap, [&](auto shape, auto has_softcap) {
    using Shape = decltype(shape);
    launch(cross_entropy_stats_kernel<T, Shape, decltype(has_softcap)::value>, (rows + Shape::rows - 1) / Shape::rows,
           Shape::block, stream, tile, row_max, row_sum, target_logit, logit_sum);
  });
}

// Overwrites a tile by grad_loss * dloss/dx, given row_max, row_sum and grad_loss, float32 [rows]. Ignored rows become
// zero.
template <typename T>
void launch_cross_entropy_grad(T* logits, int64_t row_stride, const int64_t* target, int64_t rows, int64_t cols,
                               int64_t vocab_start, int64_t vocab_size, const float* row_max, const float* row_sum,
                               const float* grad_loss, int64_t ignore_index, float softcap, float label_smoothing,
                               float z_loss, cudaStream_t stream) {
  const LogitsTile<T> tile = {logits, row_stride, target, rows, cols, vocab_start, vocab_size, ignore_index, softcap};
  dispatch_row_kernel(cols, softcap, [&](auto shape, auto has_softcap) {
    using Shape = decltype(shape);
    launch(cross_entropy_grad_kernel<T, Shape, decltype(has_softcap)::value>, (rows + Shape::rows - 1) / Shape::rows,
           Shape::block, stream, tile, row_max, row_sum, grad_loss, label_smoothing, z_loss);
  });
}

}  // namespace memkernels::cuda
