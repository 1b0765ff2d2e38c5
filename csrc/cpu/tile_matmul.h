// Products of tiles that stay in cache, for kernels that fuse several of them: C[M x N] (+)= A[M x K] B[K x N].
//
// A and B are stored in units along K. A unit is one float, or, for BFloat16 where the processor multiplies pairs of
// them (AVX-512-bf16), two neighbours along K in 32 bits, the first in the low half:
//   A: [M][K / depth] units        B: [K / depth][N] units        C: [M][N] floats
// so B has one unit per lane, and a unit of A is broadcast to all lanes. Rows of B and C start at any address. With AMX
// the same layouts are multiplied 16 rows, 16 units and 16 columns at a time, in its tile registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
template <typename T>
using Unit = std::conditional_t<std::is_same_v<T, BFloat16>, uint32_t, float>;
#else
template <typename T>
using Unit = float;
#endif

// Elements along K in one unit.
template <typename U>
constexpr int64_t kDepth = std::is_same_v<U, float> ? 1 : 2;

#if defined(CPU_CAPABILITY_AMX)
template <typename U>
constexpr bool kByAmx = !std::is_same_v<U, float>;
#else
template <typename U>
constexpr bool kByAmx = false;
#endif

// The register tile: kRows x (3 vectors), or kWideRows x (kWideVecs vectors) where N is not 3 vectors. Units along K
// are a multiple of kDepthStep.
#if defined(CPU_CAPABILITY_AVX512)
template <typename U>
constexpr int kRows = kByAmx<U> ? 16 : 8;
template <typename U>
constexpr int kWideRows = kByAmx<U> ? 16 : 6;
constexpr int kWideVecs = 4;
#else
template <typename U>
constexpr int kRows = 4;
template <typename U>
constexpr int kWideRows = 4;
constexpr int kWideVecs = 3;
#endif
template <typename U>
constexpr int kDepthStep = kByAmx<U> ? 8 : 1;

constexpr int64_t kLineUnits = 16;  // of a cache line

inline void multiply_add(Vec& c, float a, const float* b) {
  c += a * load(b);
}
#if defined(CPU_CAPABILITY_AVX512)
inline void multiply_add(Vec& c, uint32_t a, const uint32_t* b) {
  c = _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// With kAhead, rows of `next_a`, of a's stride, are fetched into the cache meanwhile.
template <int rows, int vecs, bool kAhead = false, typename U>
inline void register_tile(int64_t depth, const U* a, int64_t a_stride, const U* b, int64_t b_stride, float* c,
                          int64_t c_stride, bool accumulate, const U* next_a = nullptr) {
#if defined(CPU_CAPABILITY_AMX)
  if constexpr (kByAmx<U>) return amx_rows<vecs>(depth, a, 4 * a_stride, b, 4 * b_stride, c, 4 * c_stride, accumulate);
#endif
  Vec sums[rows][vecs];
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < vecs; ++n) sums[m][n] = accumulate ? load(c + m * c_stride + n * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    if (kAhead && k % kLineUnits == 0) {
      for (int m = 0; m < rows; ++m) __builtin_prefetch(next_a + m * a_stride + k);
    }
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < vecs; ++n) multiply_add(sums[m][n], a[m * a_stride + k], b + k * b_stride + n * kLanes);
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < vecs; ++n) store(c + m * c_stride + n * kLanes, sums[m][n]);
  }
}

// Both are functions of their own, not inlined, so that all vector registers are theirs: among others' constants the
// sums would be spilled.

// N = 3 vectors; m a multiple of kRows. depth counts units.
template <typename U>
[[gnu::noinline]] void tile_matmul(int64_t m, int64_t depth, const U* a, int64_t a_stride, const U* b, int64_t b_stride,
                                   float* c, int64_t c_stride, bool accumulate) {
  for (int64_t i = 0; i < m; i += kRows<U>) {
    register_tile<kRows<U>, 3>(depth, a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, accumulate);
  }
}

// N = `vecs` vectors, any number; m a multiple of kWideRows.
template <typename U>
[[gnu::noinline]] void wide_tile_matmul(int64_t m, int64_t vecs, int64_t depth, const U* a, int64_t a_stride,
                                        const U* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t n = 0; n < vecs; n += kWideVecs) {
    for (int64_t i = 0; i < m; i += kWideRows<U>) {
      const U* rows = a + i * a_stride;
      float* out = c + i * c_stride + n * kLanes;
      const auto run = [&]<int width>(std::integral_constant<int, width>) {
        register_tile<kWideRows<U>, width>(depth, rows, a_stride, b + n * kLanes, b_stride, out, c_stride, accumulate);
      };
      switch (vecs - n) {
        case 1:
          run(std::integral_constant<int, 1>{});
          break;
        case 2:
          run(std::integral_constant<int, 2>{});
          break;
        case 3:
          run(std::integral_constant<int, 3>{});
          break;
        default:
          run(std::integral_constant<int, kWideVecs>{});
      }
    }
  }
}

// Packing. All write zeros where the source has no element.

// Rows as they are, units along each row: out[rows_out][units_out].
template <typename T, typename U>
void pack_rows(const T* x, int64_t x_stride, int64_t rows, int64_t size, U* out, int64_t rows_out, int64_t units_out) {
  for (int64_t r = 0; r < rows_out; ++r) {
    U* to = out + r * units_out;
    if (r >= rows) {
      for (int64_t u = 0; u < units_out; ++u) to[u] = U{};
      continue;
    }
    const T* from = x + r * x_stride;
    if constexpr (kDepth<U> == 1) {
      int64_t u = 0;
      for (; u + kLanes <= size; u += kLanes) store(to + u, load(from + u));
      for (; u < units_out; ++u) to[u] = u < size ? static_cast<float>(from[u]) : 0.0f;
    } else {
      std::memcpy(to, from, size * sizeof(T));
      std::memset(reinterpret_cast<T*>(to) + size, 0, (2 * units_out - size) * sizeof(T));
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kRowsAhead = 16;  // that packing of pairs fetches into the cache

// Two vectors of pairs from 32 elements of two rows.
inline void interleave(const BFloat16* even, const BFloat16* odd, uint32_t* out) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(a, second, b));
}
#endif

// Units across rows: out[units_out][size_out], unit u of column c holds rows u * depth, ... of x.
template <typename T, typename U>
void pack_columns(const T* x, int64_t x_stride, int64_t rows, int64_t size, U* out, int64_t units_out,
                  int64_t size_out) {
  if constexpr (kDepth<U> == 1) {
    pack_rows(x, x_stride, rows, size, out, units_out, size_out);
  } else {
    const auto bits = [&](int64_t row, int64_t column) -> uint32_t {
      uint16_t value = 0;
      if (row < rows && column < size) std::memcpy(&value, x + row * x_stride + column, sizeof(value));
      return value;
    };
    for (int64_t u = 0; u < units_out; ++u) {
      U* to = out + u * size_out;
      int64_t c = 0;
      if (2 * u + 1 < rows) {
        const T* even = x + 2 * u * x_stride;
#if defined(CPU_CAPABILITY_AVX512)
        for (; c + 2 * kLanes <= size; c += 2 * kLanes) {
          __builtin_prefetch(even + kRowsAhead * x_stride + c);
          __builtin_prefetch(even + (kRowsAhead + 1) * x_stride + c);
          interleave(even + c, even + x_stride + c, to + c);
        }
#endif
        for (; c + kLanes <= size; c += kLanes) {
          const IntVec low = bits_as<IntVec>(load(even + c)), high = bits_as<IntVec>(load(even + x_stride + c));
          const IntVec pair = high | ((low >> 16) & 0xffff);
          std::memcpy(to + c, &pair, sizeof(pair));
        }
      }
      for (; c < size_out; ++c) to[c] = bits(2 * u, c) | (bits(2 * u + 1, c) << 16);
    }
  }
}

// kTransposeBlock x kTransposeBlock words.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kTransposeBlock = 16;
inline void transpose_block(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const auto* from = static_cast<const char*>(in);
  auto* to = static_cast<char*>(out);
  __m512i rows[16], pairs[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + 4 * i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // Of four rows, the columns 4 q + c in part q of rows[4 * (i / 4) + c].
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // parts 0 and 2, 1 and 3 of each operand
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(rows[c], rows[4 + c], kEven);
    const __m512i odd = _mm512_shuffle_i32x4(rows[c], rows[4 + c], kOdd);
    const __m512i even_below = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], kEven);
    const __m512i odd_below = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], kOdd);
    _mm512_storeu_si512(to + 4 * c * out_stride, _mm512_shuffle_i32x4(even, even_below, kEven));
    _mm512_storeu_si512(to + 4 * (4 + c) * out_stride, _mm512_shuffle_i32x4(odd, odd_below, kEven));
    _mm512_storeu_si512(to + 4 * (8 + c) * out_stride, _mm512_shuffle_i32x4(even, even_below, kOdd));
    _mm512_storeu_si512(to + 4 * (12 + c) * out_stride, _mm512_shuffle_i32x4(odd, odd_below, kOdd));
  }
}
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kTransposeBlock = 8;
inline void transpose_block(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const auto* from = static_cast<const float*>(in);
  auto* to = static_cast<float*>(out);
  __m256 rows[8], pairs[8];
  for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(from + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // Of four rows, the columns 4 q + c in half q of rows[4 * (i / 4) + c].
  constexpr int kLow = 0x44, kHigh = 0xee;
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], kLow);
    rows[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], kHigh);
    rows[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], kLow);
    rows[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], kHigh);
  }
  constexpr int kFirstHalves = 0x20, kSecondHalves = 0x31;
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * out_stride, _mm256_permute2f128_ps(rows[c], rows[4 + c], kFirstHalves));
    _mm256_storeu_ps(to + (4 + c) * out_stride, _mm256_permute2f128_ps(rows[c], rows[4 + c], kSecondHalves));
  }
}
#else
constexpr int64_t kTransposeBlock = 16;
#endif

// out[columns][out_stride] = in[rows][in_stride] transposed, in blocks that fit a few cache lines.
template <typename U>
void transpose(const U* in, int64_t in_stride, int64_t rows, int64_t columns, U* out, int64_t out_stride) {
  static_assert(sizeof(U) == 4);
  for (int64_t r0 = 0; r0 < rows; r0 += kTransposeBlock) {
    for (int64_t c0 = 0; c0 < columns; c0 += kTransposeBlock) {
      const int64_t r1 = std::min(r0 + kTransposeBlock, rows), c1 = std::min(c0 + kTransposeBlock, columns);
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
      if (r1 - r0 == kTransposeBlock && c1 - c0 == kTransposeBlock) {
        transpose_block(in + r0 * in_stride + c0, in_stride, out + c0 * out_stride + r0, out_stride);
        continue;
      }
#endif
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t r = r0; r < r1; ++r) out[c * out_stride + r] = in[r * in_stride + c];
      }
    }
  }
}

// Two rows of floats as one row of units for B: pairs are rounded to BFloat16; a single row of floats is itself.
inline void store_unit(float* out, Vec row) {
  store(out, row);
}
#if defined(CPU_CAPABILITY_AVX512)
inline void store_unit(uint32_t* out, Vec even, Vec odd) {
  // Rounded one after the other in one register, and then interleaved. Subnormals become zero, as by `store`.
  const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, apart));
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
