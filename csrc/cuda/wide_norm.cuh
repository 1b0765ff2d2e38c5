// RMS norm and layer norm (Centred) of wide rows, of which a block holds up to 16,384 elements in its registers, and a
// team of blocks (cuda_team.cuh) longer rows:
//
//   h = x + residual        n = (h - mean) * rstd        y = n * w + bias        w = weight + weight_offset
//   dx = rstd * (g - mean(g) - n * mean(g * n)) + dresidual_out                  g = dy * w
//   dweight = sum over rows of dy * n                    dbias = sum over rows of dy
//
// Without bias, mean and mean(g) where it is not centred. A fixed number of teams walks the rows: each reads the
// parameters once, and writes its own sums of their gradients once. Arithmetic is float32, and the order of every sum
// that of the teams.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../common/cuda_convert.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/cuda_pack.cuh"
#include "../common/cuda_reduce.cuh"
#include "../common/cuda_row.cuh"
#include "../common/cuda_team.cuh"

namespace memkernels::cuda {

constexpr int kNormThreads = 256;  // of 255 registers: all that a multiprocessor has
constexpr int kHeld = 64;          // elements of a row a thread
constexpr int kHeldByBlock = kNormThreads * kHeld;
constexpr int kWidestNorm = kMostTeam * kHeldByBlock;

// The blocks to a row of `size` elements, and the columns of each but the last: whole packs.
inline int norm_blocks(int size) {
  return (size + kHeldByBlock - 1) / kHeldByBlock;
}
inline int norm_width(int size) {
  const int blocks = norm_blocks(size), width = (size + blocks - 1) / blocks;
  return (width + kPackBytes - 1) / kPackBytes * kPackBytes;
}

// A parameter of the rows' dtype or of float32; `wide` is null where it is of the rows' dtype.
template <typename T>
struct NormParameter {
  const T* narrow;
  const float* wide;

  __device__ __forceinline__ bool given() const { return narrow != nullptr || wide != nullptr; }
  __device__ __forceinline__ float operator[](int column) const {
    return wide == nullptr ? to_float(narrow[column]) : wide[column];
  }
};

template <typename T>
struct WideNormFwd {
  const T* x;                 // [rows, size]
  const T* residual;          // like x, or null
  NormParameter<T> weight;    // [size]
  NormParameter<T> bias;      // [size], or null twice
  T* y;                       // like x
  T* residual_out;            // like x; not written without residual
  float* mean;                // [rows]; not written where it is not centred
  float* rstd;                // [rows]
  unsigned long long* words;  // team_words, zeros
  int64_t rows;
  int size;
  float eps;
  float weight_offset;
  int width = norm_width(size);
};

template <typename T>
struct WideNormBwd {
  const T* dy;                // [rows, size]
  const T* dresidual_out;     // like dy, or null
  const T* h;                 // like dy
  NormParameter<T> weight;    // [size]
  const float* mean;          // [rows]; not read where it is not centred
  const float* rstd;          // [rows]
  T* dx;                      // like dy
  float* dweight;             // [teams, size], each team's sum over its rows, or null
  float* dbias;               // likewise
  unsigned long long* words;  // team_words, zeros
  int64_t rows;
  int size;
  float weight_offset;
  int width = norm_width(size);
  float share = 1.0f / static_cast<float>(size);  // of a column in a mean
};

// The columns of a row from the thread's first one to the end of the block's.
struct Columns {
  int first, count;
};

template <int Size>
__device__ __forceinline__ Columns own_columns(int size, int width) {
  const int first = static_cast<int>(blockIdx.y) * width, rest = size - first;
  const int before = static_cast<int>(threadIdx.x) * Size;
  return {first + before, (rest < width ? rest : width) - before};
}

// The team's rows by step, which numbers its sums too: each in a register of its own is one too many.
__device__ __forceinline__ int64_t row_at(uint32_t step) {
  return blockIdx.x + int64_t{step} * gridDim.x;
}

template <typename T, int Count = kHeld, typename Body>
__device__ __forceinline__ void for_each_held(int first, int size, Body body) {
  for_each_group<T, kNormThreads, Count>(first, size, body);
}

template <int Size, typename T>
__device__ __forceinline__ void load_row(Elements<T, kHeld>& held, const T* row, int size) {
  for_each_held<T>(0, size, [&](int i) { held.template load<kNormThreads, Size>(i, row, i, size); });
}

// A parameter's elements of a group; zeros beyond the row.
template <int Size, typename T, typename Set>
__device__ __forceinline__ void load_parameter(const NormParameter<T>& parameter, int i, Columns own, Set set) {
#pragma unroll
  for (int k = i; k < i + kGroup<T>; ++k) {
    const int column = column_of<kNormThreads, Size>(k);
    set(k, column < own.count ? parameter[own.first + column] : 0.0f);
  }
}

// h = x + residual as the dtype rounds it, which is residual_out too. Loads of a part are on their way together.
template <int Size, typename T>
__device__ __forceinline__ void add_residual(Elements<T, kHeld>& h, const T* residual, T* residual_out, int size) {
  constexpr int kPart = 4 * kGroup<T>;
#pragma unroll
  for (int part = 0; part < kHeld; part += kPart) {
    Elements<T, kPart> added;
    for_each_held<T, kPart>(part, size,
                            [&](int i) { added.template load<kNormThreads, Size>(i - part, residual, i, size); });
    for_each_held<T, kPart>(part, size, [&](int i) {
#pragma unroll
      for (int k = i; k < i + kGroup<T>; ++k) h.set(k, h[k] + added[k - part]);
      h.template store<kNormThreads, Size>(i, residual_out, i, size);
    });
  }
}

struct TwoSums {
  float first, second;
};

struct AddTwoSums {
  __device__ __forceinline__ TwoSums operator()(TwoSums a, TwoSums b) const {
    return {a.first + b.first, a.second + b.second};
  }
};

// Reads x, residual once; writes y, residual_out once. Two blocks share a multiprocessor where no bias takes the
// registers, so that one loads while the other reduces.
template <typename T, int Size, bool Centred>
__global__ void __launch_bounds__(kNormThreads, Centred ? 1 : 2)
    wide_norm_fwd_kernel(const __grid_constant__ WideNormFwd<T> of) {
  const Columns own = own_columns<Size>(of.size, of.width);
  const OwnFloats<kNormThreads> weight(0);
  float bias[Centred ? kHeld : 1] = {};
  for_each_held<T>(0, own.count, [&](int i) {
    load_parameter<Size>(of.weight, i, own, [&](int k, float value) { weight[k] = value + of.weight_offset; });
    if constexpr (Centred) {
      if (of.bias.given()) load_parameter<Size>(of.bias, i, own, [&](int k, float value) { bias[k] = value; });
    }
  });
  const float count = static_cast<float>(of.size);
  const TeamSums<kNormThreads> team_sum(of.words);
  for (uint32_t step = 0; row_at(step) < of.rows; ++step) {
    const int64_t row = row_at(step);
    const int64_t first = row * of.size + own.first;
    Elements<T, kHeld> h;
    load_row<Size>(h, of.x + first, own.count);
    if (of.residual != nullptr) add_residual<Size>(h, of.residual + first, of.residual_out + first, own.count);
    float mean = 0.0f, variance;
    if constexpr (Centred) {
      float sum = 0.0f;
      for_each_held<T>(0, own.count, [&](int i) {
#pragma unroll
        for (int k = i; k < i + kGroup<T>; ++k) sum += h[k];
      });
      mean = team_sum(2 * step + 1, sum, Sum()) / count;
      // The corrected two-pass algorithm (Chan, Golub and LeVeque 1983): a large mean costs no digits.
      TwoSums sums = {0.0f, 0.0f};
      for_each_held<T>(0, own.count, [&](int i) {
#pragma unroll
        for (int k = i; k < i + kGroup<T>; ++k) {
          const float centred = column_of<kNormThreads, Size>(k) < own.count ? h[k] - mean : 0.0f;
          sums.first += centred;
          sums.second += centred * centred;
        }
      });
      sums = team_sum(2 * step + 2, sums, AddTwoSums());
      const float correction = sums.first / count;
      mean += correction;
      variance = sums.second / count - correction * correction;
    } else {
      float squares = 0.0f;
      for_each_held<T>(0, own.count, [&](int i) {
#pragma unroll
        for (int k = i; k < i + kGroup<T>; ++k) squares += h[k] * h[k];
      });
      variance = team_sum(step + 1, squares, Sum()) / count;
    }
    const float rstd = 1.0f / sqrtf(variance + of.eps);
    if (threadIdx.x == 0 && blockIdx.y == 0) {
      of.rstd[row] = rstd;
      if constexpr (Centred) of.mean[row] = mean;
    }
    for_each_held<T>(0, own.count, [&](int i) {
      Elements<T, kGroup<T>> y = {};
#pragma unroll
      for (int k = 0; k < kGroup<T>; ++k) {
        float value = (h[i + k] - mean) * rstd * weight[i + k];
        if constexpr (Centred) value += bias[i + k];
        y.set(k, value);
      }
      y.template store<kNormThreads, Size>(0, of.y + first, i, own.count);
    });
  }
}

// Sums of a thread for each element that it holds, the first `Registers` of them in registers, the others in front of
// the block's shared memory.
template <int Registers>
class HeldSums {
 public:
  __device__ __forceinline__ HeldSums() : rest_(0) {
    if constexpr (Registers < kHeld) {
#pragma unroll
      for (int i = 0; i < kHeld - Registers; ++i) rest_[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void add(int i, float value) {
    if (i < Registers) {
      held_[i] += value;
    } else {
      rest_[i - Registers] += value;
    }
  }

  __device__ __forceinline__ float operator[](int i) const { return i < Registers ? held_[i] : rest_[i - Registers]; }

 private:
  float held_[Registers] = {};
  OwnFloats<kNormThreads> rest_;
};

// Of dbias, where float32 rows leave half of what it needs.
template <typename T, bool Centred>
constexpr int kSumRegisters = Centred && std::is_same_v<T, float> ? kHeld / 2 : kHeld;

// Reads dy, h, dresidual_out once; writes dx once. dy is 0 beyond the row, and with it every sum.
template <typename T, int Size, bool Centred>
__global__ void __launch_bounds__(kNormThreads) wide_norm_bwd_kernel(const __grid_constant__ WideNormBwd<T> of) {
  const Columns own = own_columns<Size>(of.size, of.width);
  const OwnFloats<kNormThreads> weight(kHeld - kSumRegisters<T, Centred>);
  for_each_held<T>(0, own.count, [&](int i) {
    load_parameter<Size>(of.weight, i, own, [&](int k, float value) { weight[k] = value + of.weight_offset; });
  });
  float dweight[kHeld] = {};
  HeldSums<kSumRegisters<T, Centred>> dbias;
  const TeamSums<kNormThreads> team_sum(of.words);
  for (uint32_t step = 0; row_at(step) < of.rows; ++step) {
    const int64_t row = row_at(step);
    const int64_t first = row * of.size + own.first;
    Elements<T, kHeld> dy, h;
    load_row<Size>(dy, of.dy + first, own.count);
    load_row<Size>(h, of.h + first, own.count);
    const float mean = Centred ? of.mean[row] : 0.0f, rstd = of.rstd[row];
    TwoSums sums = {0.0f, 0.0f};
    for_each_held<T>(0, own.count, [&](int i) {
#pragma unroll
      for (int k = i; k < i + kGroup<T>; ++k) {
        const float normed = (h[k] - mean) * rstd, grad = dy[k] * weight[k];
        if constexpr (Centred) {
          sums.first += grad;
          dbias.add(k, dy[k]);
        }
        sums.second += grad * normed;
        dweight[k] += dy[k] * normed;
      }
    });
    sums = team_sum(step + 1, sums, AddTwoSums());
    const float grad_mean = sums.first * of.share, shrink = sums.second * of.share;
    // Loads of a part are on their way together; beside all sums of float32 rows there is room for one.
    constexpr int kPart = kSumRegisters<T, Centred> < kHeld ? kGroup<T> : 4 * kGroup<T>;
#pragma unroll
    for (int part = 0; part < kHeld; part += kPart) {
      Elements<T, kPart> added = {};
      if (of.dresidual_out != nullptr) {
        for_each_held<T, kPart>(part, own.count, [&](int i) {
          added.template load<kNormThreads, Size>(i - part, of.dresidual_out + first, i, own.count);
        });
      }
      for_each_held<T, kPart>(part, own.count, [&](int i) {
        Elements<T, kGroup<T>> dx = {};
#pragma unroll
        for (int k = 0; k < kGroup<T>; ++k) {
          const float normed = (h[i + k] - mean) * rstd, grad = dy[i + k] * weight[i + k];
          dx.set(k, rstd * (grad - grad_mean - normed * shrink) + added[i + k - part]);
        }
        dx.template store<kNormThreads, Size>(0, of.dx + first, i, own.count);
      });
    }
  }
  const int64_t first = int64_t{blockIdx.x} * of.size + own.first;
  for_each_held<T>(0, own.count, [&](int i) {
#pragma unroll
    for (int k = i; k < i + kGroup<T>; ++k) {
      const int column = column_of<kNormThreads, Size>(k);
      if (column >= own.count) continue;
      if (of.dweight != nullptr) of.dweight[first + column] = dweight[k];
      if constexpr (Centred) {
        if (of.dbias != nullptr) of.dbias[first + column] = dbias[k];
      }
    }
  });
}

// Shared memory for `floats` a thread and the weights of its groups.
template <typename T>
int norm_shared_bytes(int floats, int size) {
  constexpr int kColumns = kNormThreads * kGroup<T>;
  const int held = (norm_width(size) + kColumns - 1) / kColumns * kGroup<T>;
  return (floats + held) * kNormThreads * static_cast<int>(sizeof(float));
}

// `teams` of norm_blocks(size) walk the rows, so many as are on the GPU at once; size: 1 to kWidestNorm.
template <typename T>
void launch_wide_norm_fwd(const WideNormFwd<T>& of, bool centred, int64_t teams, cudaStream_t stream) {
  dispatch_pack<T>(
      of.size,
      [&]<int Size>(std::integral_constant<int, Size>) {
        const auto kernel = centred ? wide_norm_fwd_kernel<T, Size, true> : wide_norm_fwd_kernel<T, Size, false>;
        launch_teams(kernel, teams, norm_blocks(of.size), kNormThreads, norm_shared_bytes<T>(0, of.size), stream, of);
      },
      of.x, of.residual, of.y, of.residual_out);
}

// Without rows the teams still write their sums, zeros.
template <typename T>
void launch_wide_norm_bwd(const WideNormBwd<T>& of, bool centred, int64_t teams, cudaStream_t stream) {
  dispatch_pack<T>(
      of.size,
      [&]<int Size>(std::integral_constant<int, Size>) {
        const auto run = [&]<bool Centred>(std::bool_constant<Centred>) {
          launch_teams(wide_norm_bwd_kernel<T, Size, Centred>, teams, norm_blocks(of.size), kNormThreads,
                       norm_shared_bytes<T>(kHeld - kSumRegisters<T, Centred>, of.size), stream, of);
        };
        centred ? run(std::true_type()) : run(std::false_type());
      },
      of.dy, of.dresidual_out, of.h, of.dx);
}

}  // namespace memkernels::cuda
