// A row of a matrix in the registers of a block: how its columns are divided among threads, and what a thread holds.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_convert.cuh"
#include "cuda_pack.cuh"
#include "cuda_shared.cuh"

namespace memkernels::cuda {

// Elements of a row come to a thread in groups of 16 bytes. Of rows on 16-byte boundaries a group is a pack of Size
// neighbours; of others (Size 1) it is single elements, each Threads columns after the one before. In both, element i
// is that of a column from i * Threads to (i + group) * Threads, and the threads of a warp load neighbours.
template <typename T>
constexpr int kGroup = kPackBytes / sizeof(T);

//
// Columns are counted from the thread's first one, threadIdx.x * Size, and so are rows' addresses and lengths.
template <int Threads, int Size>
__device__ __forceinline__ constexpr int column_of(int i) {
  return i / Size * (Size * Threads) + i % Size;
}

// Calls body(i) for the first elements of the groups among [first, first + Count) that a row of `cols` reaches.
template <typename T, int Threads, int Count, typename Body>
__device__ __forceinline__ void for_each_group(int first, int cols, Body body) {
#pragma unroll
  for (int i = first; i < first + Count; i += kGroup<T>) {
    if (i * Threads < cols) body(i);
  }
}

// N elements of a thread in 32-bit registers, 16-bit ones in pairs. Every index is known when the kernel is compiled.
template <typename T, int N>
class Elements {
 public:
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words_[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? words_[i / 2] << 16 : words_[i / 2] & 0xFFFF0000u);
    } else {
      const uint16_t bits = half_word(i);
      T value;
      memcpy(&value, &bits, sizeof(T));
      return to_float(value);
    }
  }

  // Rounds to T.
  __device__ __forceinline__ void set(int i, float value) {
    const T rounded = from_float<T>(value);
    if constexpr (sizeof(T) == 4) {
      memcpy(&words_[i], &rounded, sizeof(T));
    } else {
      uint16_t bits;
      memcpy(&bits, &rounded, sizeof(T));
      set_half_word(i, bits);
    }
  }

  // The group that begins at element `at` from the row's at element `i`; zeros beyond the row.
  template <int Threads, int Size>
  __device__ __forceinline__ void load(int at, const T* row, int i, int cols) {
    if constexpr (Size == kGroup<T>) {
      const int column = column_of<Threads, Size>(i);
      const uint4 zeros = make_uint4(0, 0, 0, 0);
      const uint4 pack = column < cols ? *reinterpret_cast<const uint4*>(row + column) : zeros;
      uint32_t* to = words_ + at / kPerWord;
      to[0] = pack.x, to[1] = pack.y, to[2] = pack.z, to[3] = pack.w;
    } else {
      static_assert(Size == 1);
#pragma unroll
      for (int k = 0; k < kGroup<T>; k += kPerWord) {
        const uint32_t low = one<Threads>(row, i + k, cols);
        if constexpr (sizeof(T) == 4) {
          words_[at + k] = low;
        } else {
          // Of a pair joined by arithmetic the compiler would rather keep the parts, in two registers.
          words_[(at + k) / 2] = __byte_perm(low, one<Threads>(row, i + k + 1, cols), 0x5410);
        }
      }
    }
  }

  // The inverse; writes nothing beyond the row.
  template <int Threads, int Size>
  __device__ __forceinline__ void store(int at, T* row, int i, int cols) const {
    if constexpr (Size == kGroup<T>) {
      const int column = column_of<Threads, Size>(i);
      const uint32_t* from = words_ + at / kPerWord;
      if (column < cols) *reinterpret_cast<uint4*>(row + column) = make_uint4(from[0], from[1], from[2], from[3]);
    } else {
      static_assert(Size == 1);
#pragma unroll
      for (int k = 0; k < kGroup<T>; ++k) {
        const int column = column_of<Threads, 1>(i + k);
        if (column >= cols) continue;
        if constexpr (sizeof(T) == 4) {
          *reinterpret_cast<Bits*>(row + column) = words_[at + k];
        } else {
          *reinterpret_cast<Bits*>(row + column) = half_word(at + k);
        }
      }
    }
  }

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  static constexpr int kPerWord = 4 / sizeof(T);

  template <int Threads>
  __device__ __forceinline__ static Bits one(const T* row, int i, int cols) {
    const int column = column_of<Threads, 1>(i);
    return column < cols ? *reinterpret_cast<const Bits*>(row + column) : Bits{0};
  }

  __device__ __forceinline__ uint16_t half_word(int i) const {
    return static_cast<uint16_t>(i % 2 == 0 ? words_[i / 2] : words_[i / 2] >> 16);
  }
  __device__ __forceinline__ void set_half_word(int i, uint16_t bits) {
    uint32_t& word = words_[i / 2];
    word = i % 2 == 0 ? (word & 0xFFFF0000u) | bits : (word & 0xFFFFu) | uint32_t{bits} << 16;
  }

  uint32_t words_[N / kPerWord];
};

// Floats of a thread in the block's dynamic shared memory, from `offset` floats a thread on: registers that it lacks.
// No other thread reads them. Four of a thread lie side by side, those of the next thread after them.
template <int Threads>
class OwnFloats {
 public:
  __device__ __forceinline__ explicit OwnFloats(int offset)
      : first_(dynamic_shared_memory<float>() + offset * Threads + static_cast<int>(threadIdx.x) * 4) {}

  __device__ __forceinline__ float& operator[](int i) const { return first_[i / 4 * (4 * Threads) + i % 4]; }

 private:
  float* first_;
};

}  // namespace memkernels::cuda
