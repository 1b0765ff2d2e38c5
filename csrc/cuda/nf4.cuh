// NF4 (csrc/common/nf4.h has the formulas): quantisation of blocks, and dequantisation of a rectangle of a matrix.
//
// Every thread holds chunks of eight neighbours: 16 bytes of a 16-bit dtype, 4 bytes of codes. Arithmetic is float32
// and gives the bits of csrc/cpu/nf4.cpp: one rounding an operation, products never fused with sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/cuda_convert.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/cuda_pack.cuh"
#include "../common/cuda_reduce.cuh"
#include "../common/cuda_shared.cuh"
#include "../common/nf4.h"

namespace memkernels::cuda {

constexpr int kChunk = 8;
constexpr int kNf4Threads = 256;
constexpr int kChunksPerThread = 4;  // of a dequantised row, their loads in flight together
constexpr int64_t kRowPiece = int64_t{32} * kChunk * kChunksPerThread;  // elements of a row that a warp dequantises

// Where code i of a word begins: the first of two neighbours is the high half of their byte.
__device__ __forceinline__ constexpr int nibble(int i) {
  return i / 2 * 8 + (i % 2 == 0 ? 4 : 0);
}

// 16 bytes of value(0), value(1), ...
template <typename T, typename Value>
__device__ __forceinline__ uint4 packed_bits(const Value& value) {
  constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    T parts[kPerWord];
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) parts[i] = value(word * kPerWord + i);
    memcpy(&words[word], parts, 4);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The number of midpoints below v, 0 for NaN: four comparisons, each against the middle of what the one before left.
__device__ __forceinline__ uint32_t nf4_code(float v) {
  constexpr Nf4Table kMidpoints = nf4_midpoints();
  float midpoint[kNf4Codes - 1];
#pragma unroll
  for (int i = 0; i < kNf4Codes - 1; ++i) midpoint[i] = kMidpoints.value[i];
  uint32_t code = 0;
#pragma unroll
  for (int half = kNf4Codes / 2; half > 0; half /= 2) {
    const bool above = v > midpoint[half - 1];
    if (above) code += half;
#pragma unroll
    for (int i = 0; i < half - 1; ++i) midpoint[i] = above ? midpoint[half + i] : midpoint[i];
  }
  return code;
}

// values[0, count) of a chunk, zeros beyond.
template <typename T>
__device__ __forceinline__ void load_chunk(const T* values, int64_t count, float (&out)[kChunk]) {
  using Whole = Pack<T, kPackBytes / sizeof(T)>;
  if (count >= kChunk && is_aligned(values, kPackBytes)) {
#pragma unroll
    for (int first = 0; first < kChunk; first += Whole::size) {
      const Whole pack = *reinterpret_cast<const Whole*>(values + first);
#pragma unroll
      for (int i = 0; i < Whole::size; ++i) out[first + i] = to_float(pack.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = i < count ? to_float(values[i]) : 0.0f;
  }
}

// Threads of a thread block of nf4_quantize_kernel: those of one NF4 block, or several warps' worth of small ones.
template <int Threads>
constexpr int kQuantizeThreads = Threads <= 32 ? kNf4Threads : Threads;

// values[n] in blocks of block_size, of which Threads threads (a power of two) hold a chunk each. Reads values once;
// writes packed, n / 2 bytes rounded up and 4-byte aligned, and 4 bytes of absmax a block.
template <typename T, int Threads>
__global__ void __launch_bounds__(kQuantizeThreads<Threads>)
    nf4_quantize_kernel(const T* values, int64_t n, int block_size, uint8_t* packed, float* absmax) {
  constexpr int kBlocks = kQuantizeThreads<Threads> / Threads;
  const int64_t block = int64_t{blockIdx.x} * kBlocks + threadIdx.x / Threads;
  const int thread = threadIdx.x % Threads;
  const int64_t first = block * block_size + int64_t{thread} * kChunk;
  const int64_t left = n - first;
  const int64_t count = thread * kChunk >= block_size ? 0 : left < kChunk ? left : kChunk;

  float v[kChunk];
  load_chunk(values + first, count, v);
  uint32_t largest = largest_of(v);
  if constexpr (Threads <= 32) {
    largest = warp_reduce<Threads>(largest, Larger());
  } else {
    largest = block_reduce<Threads>(largest, Larger());
  }
  if (count <= 0) return;

  // bitsandbytes divides in the last block of a tensor, if it is incomplete, and stores no absmax below kLeastAbsmax.
  const bool whole = (block + 1) * block_size <= n;
  const float maximum = __uint_as_float(largest);
  const float divisor = maximum < kLeastAbsmax ? kLeastAbsmax : maximum;
  const float inverse = 1.0f / divisor;
  if (thread == 0) absmax[block] = whole ? maximum : divisor;

  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const uint32_t code = nf4_code(whole ? v[i] * inverse : v[i] / divisor);
    word |= code << nibble(i);
  }
  if (count == kChunk) {
    *reinterpret_cast<uint32_t*>(packed + first / 2) = word;
  } else {
    for (int64_t i = 0; i < (count + 1) / 2; ++i) packed[first / 2 + i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

template <typename T>
void launch_nf4_quantize(const T* values, int64_t n, int64_t block_size, uint8_t* packed, float* absmax,
                         cudaStream_t stream) {
  const int64_t blocks = (n + block_size - 1) / block_size;
  const auto run = [&]<int Threads>(std::integral_constant<int, Threads>) {
    constexpr int kThreads = kQuantizeThreads<Threads>;
    constexpr int kBlocks = kThreads / Threads;
    launch(nf4_quantize_kernel<T, Threads>, (blocks + kBlocks - 1) / kBlocks, kThreads, stream, values, n,
           static_cast<int>(block_size), packed, absmax);
  };
  const auto holds = [&](int threads) { return block_size <= int64_t{threads} * kChunk; };
  if (holds(8)) {
    run(std::integral_constant<int, 8>());
  } else if (holds(32)) {
    run(std::integral_constant<int, 32>());
  } else if (holds(128)) {
    run(std::integral_constant<int, 128>());
  } else {
    run(std::integral_constant<int, 512>());
  }
}

// A rectangle of a matrix stored in NF4, and where its values go.
template <typename T>
struct Nf4Rectangle {
  T* out;  // [rows, columns], rows out_stride elements apart
  int64_t rows, columns, out_stride;
  const uint8_t* packed;
  Nf4Scales scales;
  int block_size;
  int64_t row_size, first_row, first_column;  // of the matrix, and where the rectangle lies in it
};

__device__ __forceinline__ float nf4_absmax(const Nf4Scales& scales, float offset, int64_t block) {
  if (scales.codes == nullptr) return scales.absmax[block];
  return __fadd_rn(__fmul_rn(scales.nested_code[scales.codes[block]], scales.nested_absmax[block / kNestedBlock]),
                   offset);
}

// The code of element `index` of the tensor.
__device__ __forceinline__ int code_at(const uint8_t* packed, int64_t index) {
  return packed[index / 2] >> nibble(index % 2) & 15;
}

// A warp dequantises a piece of a row. Reads the codes and absolute maxima once, writes the values once. Aligned: every
// row starts on a 16-byte boundary of out and, in the tensor, at a multiple of 8 elements.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kNf4Threads) nf4_dequantize_kernel(Nf4Rectangle<T> of, int64_t pieces_per_row) {
  // 16 floats on 16 banks: a warp's lookups never wait for each other.
  Nf4Table& table = shared_memory<Nf4Table>();
  if (threadIdx.x == 0) table = nf4_values();
  __syncthreads();

  const int64_t piece = int64_t{blockIdx.x} * (kNf4Threads / 32) + threadIdx.x / 32;
  const int64_t row = piece / pieces_per_row;
  if (row >= of.rows) return;
  const int64_t first_column = (piece - row * pieces_per_row) * kRowPiece;
  const int64_t first = (of.first_row + row) * of.row_size + of.first_column + first_column;
  const int64_t first_block = first / of.block_size;
  const int in_block = static_cast<int>(first - first_block * of.block_size);
  const int64_t count = of.columns - first_column < kRowPiece ? of.columns - first_column : kRowPiece;
  T* out = of.out + row * of.out_stride + first_column;

  const float offset = of.scales.codes == nullptr ? 0.0f : *of.scales.offset;

  // That of element i of the piece, i < kRowPiece: a division by 32 bits.
  const auto absmax = [&](int i) {
    return nf4_absmax(of.scales, offset, first_block + static_cast<uint32_t>(in_block + i) / of.block_size);
  };

  int done = 0;
  if constexpr (Aligned) {
    const int lane = threadIdx.x % 32;
    const auto load = [&](int i) { return *reinterpret_cast<const uint32_t*>(of.packed + (first + i) / 2); };
    const auto store = [&](int i, uint32_t codes, float scale) {
      constexpr int kPart = kPackBytes / sizeof(T);
#pragma unroll
      for (int part = 0; part < kChunk; part += kPart) {
        const uint4 bits = packed_bits<T>(
            [&](int j) { return from_float<T>(__fmul_rn(table.value[codes >> nibble(part + j) & 15], scale)); });
        __stwb(reinterpret_cast<uint4*>(out + i + part), bits);
      }
    };
    if (count == kRowPiece) {
      uint32_t codes[kChunksPerThread];
      float scale[kChunksPerThread];
#pragma unroll
      for (int chunk = 0; chunk < kChunksPerThread; ++chunk) {
        const int i = (chunk * 32 + lane) * kChunk;
        codes[chunk] = load(i);
        scale[chunk] = absmax(i);
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunksPerThread; ++chunk) {
        store((chunk * 32 + lane) * kChunk, codes[chunk], scale[chunk]);
      }
      return;
    }
    done = static_cast<int>(count) / kChunk * kChunk;
#pragma unroll 1
    for (int i = lane * kChunk; i < done; i += 32 * kChunk) store(i, load(i), absmax(i));
  }
#pragma unroll 1
  for (int i = done + threadIdx.x % 32; i < count; i += 32) {
    out[i] = from_float<T>(__fmul_rn(table.value[code_at(of.packed, first + i)], absmax(i)));
  }
}

template <typename T>
void launch_nf4_dequantize(const Nf4Rectangle<T>& of, cudaStream_t stream) {
  constexpr int64_t kPieces = kNf4Threads / 32;
  const int64_t pieces_per_row = (of.columns + kRowPiece - 1) / kRowPiece;
  const int64_t blocks = (of.rows * pieces_per_row + kPieces - 1) / kPieces;
  const bool one_row = of.rows == 1;
  const int64_t first = of.first_row * of.row_size + of.first_column;
  const bool aligned = first % kChunk == 0 && reinterpret_cast<uintptr_t>(of.out) % kPackBytes == 0 &&
                       reinterpret_cast<uintptr_t>(of.packed) % sizeof(uint32_t) == 0 &&
                       (one_row || (of.row_size % kChunk == 0 && of.out_stride * sizeof(T) % kPackBytes == 0));
  if (aligned) {
    launch(nf4_dequantize_kernel<T, true>, blocks, kNf4Threads, stream, of, pieces_per_row);
  } else {
    launch(nf4_dequantize_kernel<T, false>, blocks, kNf4Threads, stream, of, pieces_per_row);
  }
}

}  // namespace memkernels::cuda
