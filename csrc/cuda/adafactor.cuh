// Adafactor (common/adafactor.h) on matrices (B, M, N), one after the other: the sums of squares of their rows and
// their columns, the sum of the squares of u, and the step. Each reads the gradient once, and sums in an order that
// hangs on nothing but the shape.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/adafactor.h"
#include "optimizer.cuh"
#include "square_sum.cuh"

namespace memkernels::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / 32;
constexpr int kTileRows = 32 * kTileWarps;
constexpr int64_t kMostTiles = 64;    // of a column: their sums are added one after the other
constexpr int kSmallElements = 1024;  // of matrices that blocks take whole
// Of a warp: so many that the columns' factors, which it reads once, are few bytes beside them.
constexpr int64_t kSummedRuns = 64;
constexpr int64_t kSteppedRuns = 32;
// Of a multiprocessor at a time: that leaves 128 registers a thread.
constexpr int kAdafactorBlocks = 4;

template <typename T>
constexpr int kTilePack = kPackBytes / static_cast<int>(sizeof(T));

// Sums of the squares of grad_scale grad_factor g: sums[part][...] for each part of a row or a column.
//
// A block has a tile: `tile_rows` rows of a matrix, of which its warps take 32 at a time, and the columns that a warp
// reads at once. A row is read by `lanes` of its lanes, a power of two, and where those are not all the others read the
// rows `lanes` below it: in step i a group of lanes has its i-th row, whose sum its i-th lane keeps.
template <typename T>
struct SquareTiles {
  const T* grad;
  Matrices of;
  const float* grad_factor;
  float grad_scale;
  int lanes;
  bool aligned;
  uint32_t row_parts, column_parts;  // of a grid, whose blocks are below 2^31
  int64_t tile_rows;

  SquareTiles(const T* grad_, const Matrices& of_, float grad_scale_, const float* grad_factor_)
      : grad(grad_), of(of_), grad_factor(grad_factor_), grad_scale(grad_scale_), lanes(32) {
    constexpr int64_t kPack = kTilePack<T>;
    while (lanes > 1 && lanes / 2 * kPack >= of.width) lanes /= 2;
    aligned = of.width % kPack == 0 && reinterpret_cast<uintptr_t>(grad) % kPackBytes == 0;
    tile_rows = (of.rows + kTileRows * kMostTiles - 1) / (kTileRows * kMostTiles) * kTileRows;
    row_parts = static_cast<uint32_t>((of.width + lanes * kPack - 1) / (lanes * kPack));
    column_parts = static_cast<uint32_t>((of.rows + tile_rows - 1) / tile_rows);
  }
};

struct TileSums {
  float value[kTileWarps][32][kQuad];
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    factored_squares_kernel(const __grid_constant__ SquareTiles<T> tiles, float* row_sums, float* column_sums) {
  constexpr int kPack = kTilePack<T>, kInFlight = 4;
  const Matrices& of = tiles.of;
  const float scale = tiles.grad_scale * (tiles.grad_factor == nullptr ? 1.0f : *tiles.grad_factor);
  const int lanes = tiles.lanes, at_lane = lane() & (lanes - 1), warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t above = blockIdx.x / tiles.row_parts;
  const int64_t row_part = blockIdx.x % tiles.row_parts;
  const int64_t column_part = above % tiles.column_parts, matrix = above / tiles.column_parts;
  const int64_t first_column = row_part * lanes * kPack, column = first_column + at_lane * kPack;
  const int64_t left = of.width - column;
  const int count = left < 0 ? 0 : left < kPack ? static_cast<int>(left) : kPack;
  const int64_t first_row = column_part * tiles.tile_rows;
  const int64_t end = of.rows - first_row < tiles.tile_rows ? of.rows : first_row + tiles.tile_rows;
  float columns[kPack] = {};
#pragma unroll 1
  for (int64_t first = first_row + warp * 32; first < end; first += kTileRows) {
    float row_sum = 0.0f;
#pragma unroll 1
    for (int step = 0; step < lanes; step += kInFlight) {
      T held[kInFlight][kPack];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t row = first + lane() - at_lane + step + i;
        const bool exists = step + i < lanes && row < end;
        const T* from = tiles.grad + (matrix * of.rows + row) * of.width + column;
        load_group(from, 0, exists ? count : 0, tiles.aligned && exists && count > 0, held[i]);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const float value = widened(held[i][k]) * scale;
          columns[k] += value * value;
          sum += value * value;
        }
        for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (at_lane == step + i) row_sum = sum;
      }
    }
    const int64_t row = first + lane();
    if (row < end) row_sums[(row_part * of.count + matrix) * of.rows + row] = row_sum;
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    for (int mask = lanes; mask < 32; mask *= 2) columns[k] += shuffle_xor(columns[k], mask);
  }
  // A quad of each lane at a time, added over the warps by a thread for each of their numbers.
  TileSums& sums = shared_memory<TileSums>();
#pragma unroll
  for (int quad = 0; quad < kPack / kQuad; ++quad) {
    if (quad > 0) __syncthreads();
#pragma unroll
    for (int k = 0; k < kQuad; ++k) sums.value[warp][lane()][k] = columns[quad * kQuad + k];
    __syncthreads();
    const int of_lane = static_cast<int>(threadIdx.x) / kQuad, k = static_cast<int>(threadIdx.x) % kQuad;
    const int64_t at = first_column + of_lane * kPack + quad * kQuad + k;
    if (of_lane < lanes && at < of.width) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kTileWarps; ++i) sum += sums.value[i][of_lane][k];
      column_sums[(column_part * of.count + matrix) * of.width + at] = sum;
    }
  }
}

struct SmallSquares {
  float value[kSmallElements];
};

// Matrices of kSmallElements at most: a block takes as many as are no more together, and a thread sums a row or a
// column.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    small_squares_kernel(const __grid_constant__ SquareTiles<T> tiles, int64_t per_block, float* row_sums,
                         float* column_sums) {
  const int rows = static_cast<int>(tiles.of.rows), width = static_cast<int>(tiles.of.width), size = rows * width;
  const float scale = tiles.grad_scale * (tiles.grad_factor == nullptr ? 1.0f : *tiles.grad_factor);
  const int64_t first = blockIdx.x * per_block, left = tiles.of.count - first;
  const int matrices = static_cast<int>(left < per_block ? left : per_block);
  SmallSquares& squares = shared_memory<SmallSquares>();
  for (int i = threadIdx.x; i < matrices * size; i += kTileThreads) {
    const float value = widened(tiles.grad[first * size + i]) * scale;
    squares.value[i] = value * value;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < matrices * rows; row += kTileThreads) {
    float sum = 0.0f;
    for (int i = 0; i < width; ++i) sum += squares.value[row * width + i];
    row_sums[first * rows + row] = sum;
  }
  for (int column = threadIdx.x; column < matrices * width; column += kTileThreads) {
    float sum = 0.0f;
    for (int i = 0; i < rows; ++i) sum += squares.value[column / width * size + i * width + column % width];
    column_sums[first * width + column] = sum;
  }
}

// sums[i] = the sum over k of parts[k][i].
static __global__ void __launch_bounds__(kTileThreads)
    part_sums_kernel(const float* parts, int64_t count, int64_t size, float* sums) {
  const int64_t i = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t k = 0; k < count; ++k) sum += parts[k * size + i];
  sums[i] = sum;
}

inline void launch_part_sums(const float* parts, int64_t count, int64_t size, float* sums, cudaStream_t stream) {
  launch(part_sums_kernel, (size + kTileThreads - 1) / kTileThreads, kTileThreads, stream, parts, count, size, sums);
}

template <typename T>
bool are_small(const SquareTiles<T>& tiles) {
  return tiles.of.count > 1 && tiles.of.rows * tiles.of.width <= kSmallElements;
}

// The sums of matrices with elements: of small ones by row and by column, otherwise those of parts.
template <typename T>
void launch_factored_squares(const SquareTiles<T>& tiles, float* row_sums, float* column_sums, cudaStream_t stream) {
  const Matrices& of = tiles.of;
  if (are_small(tiles)) {
    const int64_t per_block = kSmallElements / (of.rows * of.width);
    launch(small_squares_kernel<T>, (of.count + per_block - 1) / per_block, kTileThreads, stream, tiles, per_block,
           row_sums, column_sums);
    return;
  }
  launch(factored_squares_kernel<T>, of.count * int64_t{tiles.column_parts} * tiles.row_parts, kTileThreads, stream,
         tiles, row_sums, column_sums);
}

// What a warp does of matrices' elements: runs of 256. Where rows are whole runs those below each other, whose columns'
// factors it reads once; otherwise those that follow each other.
struct WarpRuns {
  int64_t first, count, step;  // elements, runs, elements
};

struct FactorRuns {
  Factors factors;
  int64_t size;
  int64_t per_warp;
  int64_t run_columns, warps_of_matrix;  // where rows are whole runs, otherwise 0

  FactorRuns(const Factors& factors_, int64_t size_, int64_t per_warp_)
      : factors(factors_), size(size_), per_warp(per_warp_) {
    const Matrices& of = factors.of;
    const bool aligned = reinterpret_cast<uintptr_t>(factors.columns) % (kQuad * sizeof(float)) == 0;
    run_columns = aligned && of.width % kRun == 0 ? of.width / kRun : 0;
    warps_of_matrix = run_columns * ((of.rows + per_warp - 1) / per_warp);
  }

  MEMKERNELS_HOST_DEVICE int64_t warps() const {
    return run_columns > 0 ? factors.of.count * warps_of_matrix : (size + per_warp * kRun - 1) / (per_warp * kRun);
  }

  __device__ __forceinline__ WarpRuns of_warp(int64_t warp) const {
    if (run_columns == 0) {
      const int64_t first = warp * per_warp * kRun, runs = (size - first + kRun - 1) / kRun;
      return {first, runs < per_warp ? runs : per_warp, kRun};
    }
    const Matrices& of = factors.of;  // of which warps are below 2^32
    const uint32_t each = static_cast<uint32_t>(warps_of_matrix), across = static_cast<uint32_t>(run_columns);
    const uint32_t matrix = static_cast<uint32_t>(warp) / each, within = static_cast<uint32_t>(warp) % each;
    const int64_t row = within / across * per_warp;
    const int64_t first = (matrix * of.rows + row) * of.width + within % across * kRun;
    return {first, of.rows - row < per_warp ? of.rows - row : per_warp, of.width};
  }

  // The i-th of a warp's; `aligned`: whether quads of every tensor can be read at once.
  __device__ __forceinline__ Run run(const WarpRuns& of, int64_t i, bool aligned) const {
    const int64_t first = of.first + i * of.step, left = size - first;
    return {first, static_cast<int>(left < kRun ? left : kRun), aligned && left >= kRun};
  }
};

// a / b, where a is below b + 2^20.
__device__ __forceinline__ uint32_t quotient(int64_t a, int64_t b) {
  return a < b ? 0 : b > INT32_MAX ? 1 : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// A gradient times its elements' factors, in a warp's runs, of which `load_values` gives that of number `at`.
template <typename T>
struct FactoredGradient {
  const T* data;
  const FactorRuns& runs;
  int at = 0;
  int64_t row, column;  // of the first element; the row is counted over all matrices, row_of_matrix within its own
  int64_t row_of_matrix, matrix;
  Values columns{};  // the factors of all of the runs, where rows are whole runs

  __device__ __forceinline__ FactoredGradient(const T* data_, const FactorRuns& runs_, int64_t first)
      : data(data_), runs(runs_) {
    const Factors& factors = runs.factors;
    row = first / factors.of.width, column = first - row * factors.of.width;
    matrix = row / factors.of.rows, row_of_matrix = row - matrix * factors.of.rows;
    if (runs.run_columns == 0) return;
    load_values(factors.columns + matrix * factors.of.width, {column, kRun, true}, columns);
  }
};

template <typename T>
__device__ __forceinline__ void load_values(const FactoredGradient<T>& grad, const Run& run, Values& values) {
  const Factors& factors = grad.runs.factors;
  const int64_t width = factors.of.width;
  load_values(grad.data, run, values);
  if (grad.runs.run_columns > 0) {
    const float of_row = factors.rows[grad.row + grad.at];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        values.value[quad][i] *= OneLane::min(grad.columns.value[quad][i] * of_row, factors.most);
      }
    }
    return;
  }
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    if (first_of(quad) >= run.count) return;
    int64_t column = grad.column + grad.at * static_cast<int>(kRun) + first_of(quad);
    uint32_t below = quotient(column, width);  // the first element's row
    column -= below * width;
    const auto columns_of = [&](uint32_t rows_below) {
      return factors.columns + (grad.matrix + quotient(grad.row_of_matrix + rows_below, factors.of.rows)) * width;
    };
    float of_row = factors.rows[grad.row + below];
    const float* of_columns = columns_of(below);
#pragma unroll
    for (int i = 0; i < kQuad; ++i, ++column) {
      if (first_of(quad) + i >= run.count) return;
      if (column == width) {
        column = 0;
        of_row = factors.rows[grad.row + ++below];
        of_columns = columns_of(below);
      }
      values.value[quad][i] *= OneLane::min(of_columns[column] * of_row, factors.most);
    }
  }
}

inline int64_t factor_blocks(const FactorRuns& runs) {
  return (runs.warps() + kOptimizerWarps - 1) / kOptimizerWarps;
}

// sums[block] of the squares of grad_scale grad_factor u.
template <typename T>
__global__ void __launch_bounds__(kOptimizerThreads)
    factored_square_sum_kernel(const __grid_constant__ FactorRuns runs, const T* grad, float grad_scale,
                               const float* grad_factor, double* sums) {
  const float scale = grad_scale * (grad_factor == nullptr ? 1.0f : *grad_factor);
  const int64_t warp = int64_t{blockIdx.x} * kOptimizerWarps + threadIdx.x / 32;
  float sum = 0.0f;
  if (warp < runs.warps()) {
    const WarpRuns own = runs.of_warp(warp);
    FactoredGradient<T> gradient(grad, runs, own.first);
    const bool aligned = is_aligned(grad, kQuad * sizeof(T));
#pragma unroll 4
    for (; gradient.at < own.count; ++gradient.at) {
      Values u;
      load_values(gradient, runs.run(own, gradient.at, aligned), u);
#pragma unroll
      for (const auto& quad : u.value) {
#pragma unroll
        for (const float value : quad) sum += (value * scale) * (value * scale);
      }
    }
  }
  const double total = block_reduce<kOptimizerThreads>(static_cast<double>(sum), Sum());
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// sums: factor_blocks(runs) of them, and their own in `result`.
template <typename T>
void launch_factored_square_sum(const FactorRuns& runs, const T* grad, float grad_scale, const float* grad_factor,
                                double* sums, double* result, cudaStream_t stream) {
  const int64_t blocks = factor_blocks(runs);
  launch(factored_square_sum_kernel<T>, blocks, kOptimizerThreads, stream, runs, grad, grad_scale, grad_factor, sums);
  launch_square_sum_total(sums, blocks, result, stream);
}

// A parameter and what its step takes.
struct AdafactorStep {
  FactorRuns runs;
  Slot slot;
  AdafactorUpdate update;
  uint64_t seed;
  const float* grad_factor;
  const float* lr_factor;
  float grad_scale;
};

template <typename Parameter, typename... Moments>
__global__ void __launch_bounds__(kOptimizerThreads, kAdafactorBlocks)
    adafactor_kernel(const __grid_constant__ AdafactorStep step) {
  (Moments::prepare(), ...);
  __syncthreads();
  const int64_t warp = int64_t{blockIdx.x} * kOptimizerWarps + threadIdx.x / 32;
  if (warp >= step.runs.warps()) return;
  const float grad_scale = step.grad_scale * (step.grad_factor == nullptr ? 1.0f : *step.grad_factor);
  const AdafactorUpdate update = step.lr_factor == nullptr ? step.update : step.update.scaled(*step.lr_factor);
  const auto* grad = static_cast<const typename Parameter::Stored*>(step.slot.grad);
  const WarpRuns own = step.runs.of_warp(warp);
  FactoredGradient<typename Parameter::Stored> gradient(grad, step.runs, own.first);
  const auto each = [&](const Parameter& parameter, const Moments&... moments) {
    const bool aligned =
        is_aligned(grad, kQuad * sizeof(*grad)) && parameter.is_aligned() && (moments.is_aligned() && ...);
#pragma unroll 1
    for (; gradient.at < own.count; ++gradient.at) {
      update_run(update, step.runs.run(own, gradient.at, aligned), grad_scale, gradient, parameter, moments...);
    }
  };
  each(parameter_of<Parameter>(step.slot, step.seed), moment_of<Moments>(step.slot, step.seed, 0)...);
}

template <typename... Moments>
void launch_adafactor_stored(const AdafactorStep& step, cudaStream_t stream) {
  const int64_t blocks = factor_blocks(step.runs);
  if (!step.slot.bfloat16) {
    launch(adafactor_kernel<PlainFloat, Moments...>, blocks, kOptimizerThreads, stream, step);
  } else if (step.slot.remainder == nullptr) {
    launch(adafactor_kernel<StochasticBFloat16, Moments...>, blocks, kOptimizerThreads, stream, step);
  } else {
    launch(adafactor_kernel<SplitFloat, Moments...>, blocks, kOptimizerThreads, stream, step);
  }
}

// The step of a group of one parameter.
inline void launch_adafactor(const Group& group, bool has_moment, const Adafactor& rule, const Factors& factors,
                             cudaStream_t stream) {
  const Slot& slot = group.slots[0];
  if (slot.size == 0) return;
  const AdafactorStep step = {.runs = {factors, slot.size, kSteppedRuns},
                              .slot = slot,
                              .update = rule.at(slot.step),
                              .seed = group.seed,
                              .grad_factor = group.grad_factor,
                              .lr_factor = group.lr_factor,
                              .grad_scale = group.grad_scale};
  if (!has_moment) return launch_adafactor_stored<>(step, stream);
  with_state_bits(group.state_bits, [&]<int kBits>(std::integral_constant<int, kBits>) {
    launch_adafactor_stored<Moment<kBits, true>>(step, stream);
  });
}

}  // namespace memkernels::cuda
