// A vector of floats as wide as the instruction set this file is compiled for, on the compiler's own vector types:
// arithmetic, comparison and `?:` are the built-in operators. Elements in memory may be float, BFloat16 or Half.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#include "common/lanes.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kLanes = 16;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

inline Vec broadcast(float value) {
  return value - Vec{};
}
// b where either is NaN. The compiler makes two instructions of the `?:`.
inline Vec max(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec min(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vec sqrt(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_sqrt_ps(v);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_sqrt_ps(v);
#else
  for (int64_t i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Folds the lanes of v by `fold` on vectors of four, then on floats: a short chain, since short rows wait for it.
template <typename Fold>
inline float fold_lanes(Vec v, Fold&& fold) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof(v));
  Four q = parts[0];
  for (int64_t i = 1; i < kLanes / 4; ++i) q = fold(q, parts[i]);
  return fold(fold(q[0], q[2]), fold(q[1], q[3]));
}

inline float sum(Vec v) {
  return fold_lanes(v, [](auto a, auto b) { return a + b; });
}

inline float max(Vec v) {
  return fold_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Whether any lane of a comparison holds.
inline bool any(IntVec mask) {
  int32_t bits = 0;
  for (int64_t i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
}

// load: kLanes elements at p, widened to float.
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The compiler's own conversion between 16 and 32 bits splits a wide vector in two: hence the intrinsics.
inline Vec load(const BFloat16* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return bits_as<Vec>(bits_as<IntVec>(bits) << 16);
#elif defined(CPU_CAPABILITY_AVX2)
  const auto bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return bits_as<Vec>(bits_as<IntVec>(bits) << 16);
#else
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits_as<Vec>(__builtin_convertvector(bits, IntVec) << 16);
#endif
}

inline Vec load(const Half* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// store: kLanes floats to p, rounded to nearest even.
inline void store(float* p, Vec v) {
  std::memcpy(p, &v, sizeof(v));
}

inline void store(BFloat16* p, Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  // The instruction rounds subnormals, below 1.2e-38, to zero.
  const __m256bh narrow = _mm512_cvtneps_pbh(v);
#else
  const IntVec bits = bits_as<IntVec>(v);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec quiet_nan = (bits >> 16) | 0x40;
  const HalfBits narrow = __builtin_convertvector(v == v ? rounded : quiet_nan, HalfBits);
#endif
  std::memcpy(p, &narrow, sizeof(narrow));
}

inline void store(Half* p, Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

// store past the caches, for results too large to be found there when they are read: the line is not fetched first.
// p is aligned to the elements stored. Other threads see them after end_of_stream().
#if defined(__x86_64__)
inline void stream(float* p, Vec v) {
  #if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_ps(p, v);
  #elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_ps(p, v);
  #else
  _mm_stream_ps(p, v);
  #endif
}

template <typename T>
inline void stream(T* p, Vec v) {
  T elements[kLanes];
  store(elements, v);
  HalfBits narrow;
  std::memcpy(&narrow, elements, sizeof(narrow));
  #if defined(CPU_CAPABILITY_AVX512)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(narrow));
  #elif defined(CPU_CAPABILITY_AVX2)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(narrow));
  #else
  _mm_stream_si64(reinterpret_cast<long long*>(p), bits_as<long long>(narrow));
  #endif
}

inline void end_of_stream() {
  _mm_sfence();
}
#else
template <typename T>
inline void stream(T* p, Vec v) {
  store(p, v);
}

inline void end_of_stream() {}
#endif

// Fresh results from here on go past the caches: whoever reads them next would not find them there.
constexpr int64_t kStreamedBytes = 16 << 20;

template <bool kStreamed, typename T>
inline void store_or_stream(T* p, Vec v) {
  if constexpr (kStreamed) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

// The same for the last `count` < kLanes elements of a row; the lanes beyond hold `fill`.
template <typename T>
inline Vec load_partial(const T* p, int64_t count, float fill = 0.0f) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_loadu_ps(broadcast(fill), mask, p);
  } else {
    const __m256i elements = _mm256_maskz_loadu_epi16(mask, p);
    return _mm512_mask_mov_ps(broadcast(fill), mask, load(reinterpret_cast<const T*>(&elements)));
  }
#else
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  Vec v = load(lanes);
  for (int64_t i = count; i < kLanes; ++i) v[i] = fill;
  return v;
#endif
}

template <typename T>
inline void store_partial(T* p, Vec v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
#if defined(CPU_CAPABILITY_AVX512)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, v);
  } else {
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
#else
  std::memcpy(p, lanes, count * sizeof(T));
#endif
}

// Calls body(load, store) for each vector of a row of n elements, the incomplete one last. `load` and `store` take a
// row's base pointer, so that one body serves whole and incomplete vectors; load's second argument is what the lanes
// beyond the row's end hold, by default 0. With kStreamed, whole vectors are stored by `stream`.
template <bool kStreamed = false, typename Body>
inline void for_each_vec(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    body([i](const auto* row, float = 0.0f) { return load(row + i); },
         [i](auto* row, Vec v) { store_or_stream<kStreamed>(row + i, v); });
  }
  if (i < n) {
    body([i, n](const auto* row, float fill = 0.0f) { return load_partial(row + i, n - i, fill); },
         [i, n](auto* row, Vec v) { store_partial(row + i, v, n - i); });
  }
}

// The sums over a row of n elements of what body(load, store, sums) adds to its N sums; `load` and `store` as above.
// Several vectors are in flight at once, each with sums of its own, since an addition takes longer than a load. With
// kStreamed, whole vectors are stored by `stream`.
template <int N, bool kStreamed = false, typename Body>
inline std::array<float, N> sum_each_vec(int64_t n, Body&& body) {
  constexpr int64_t kInFlight = 4;
  Vec sums[kInFlight][N] = {};
  int64_t i = 0;
  for (; i + kInFlight * kLanes <= n; i += kInFlight * kLanes) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kInFlight; ++j) {
      const int64_t at = i + j * kLanes;
      body([at](const auto* row, float = 0.0f) { return load(row + at); },
           [at](auto* row, Vec v) { store_or_stream<kStreamed>(row + at, v); }, sums[j]);
    }
  }
  for_each_vec<kStreamed>(n - i, [&](auto at, auto to) {
    body([&](const auto* row, float fill = 0.0f) { return at(row + i, fill); },
         [&](auto* row, Vec v) { to(row + i, v); }, sums[0]);
  });
  std::array<float, N> totals;
  for (int k = 0; k < N; ++k) totals[k] = sum((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
  return totals;
}

// p * 2^n for whole n from -250 to 250; NaN for NaN.
inline Vec scaled(Vec p, Vec n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  // 2^n in two factors, since n = 128 has no float of its own.
  const IntVec exponent = __builtin_convertvector(n, IntVec);
  const IntVec half = exponent >> 1;
  return p * bits_as<Vec>((half + 127) << 23) * bits_as<Vec>((exponent - half + 127) << 23);
#endif
}

// e^x to about 1 unit in the last place; 0 below -87.3, inf above 88.7, NaN for NaN.
inline Vec exp(Vec x) {
  const Vec clamped = min(broadcast(89.0f), x);             // inf would become inf - inf; a NaN stays
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = broadcast(1.98756915e-4f);
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345190e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return x < -87.33f ? Vec{} : scaled(p, n);
}

// 2^x to about 1 unit in the last place for |x| < 250; NaN for NaN. The fit on |r| <= 1/2 has a relative error of 2e-9.
inline Vec exp2(Vec x) {
  const Vec n = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  const Vec r = x - n;
  Vec p = broadcast(0.000153458081f);
  p = p * r + 0.00133999309f;
  p = p * r + 0.00961848907f;
  p = p * r + 0.0555032864f;
  p = p * r + 0.240226462f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  return scaled(p, n);
}

// tanh(x) to about 2 units in the last place; NaN for NaN.
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  // A fit of (tanh(x) - x) / x^3 on |x| < 0.625, where the other form cancels.
  Vec p = broadcast(-5.7169846e-3f);
  p = p * square + 2.0650528e-2f;
  p = p * square - 5.3743478e-2f;
  p = p * square + 1.3331491e-1f;
  p = p * square - 3.3333284e-1f;
  const Vec small = x + x * square * p;
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const Vec wide = magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
  return x == x ? wide : x;
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
