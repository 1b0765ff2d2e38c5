// The absolute maximum of a block.
#pragma once

#include <algorithm>
#include <bit>

#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// The largest magnitude of n values, n a multiple of kLanes; as integers, so that a NaN is above infinity.
template <typename T>
inline float absolute_maximum(const T* values, int64_t n) {
  IntVec largest{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const IntVec magnitude = bits_as<IntVec>(load(values + i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  // By vectors of four, for a block may be two vectors long.
  typedef int32_t Four __attribute__((vector_size(16)));
  Four parts[kLanes / 4];
  std::memcpy(parts, &largest, sizeof(largest));
  Four four = parts[0];
  for (const Four& part : parts) four = part > four ? part : four;
  return std::bit_cast<float>(std::max(std::max(four[0], four[1]), std::max(four[2], four[3])));
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

// Of 16-bit elements, n a multiple of twice kLanes: compared as they are stored, which needs no widening.
template <typename T>
  requires(sizeof(T) == 2)
inline float absolute_maximum(const T* values, int64_t n) {
  #if defined(CPU_CAPABILITY_AVX512)
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i wide = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    wide = _mm512_max_epi16(wide, _mm512_and_si512(_mm512_loadu_si512(values + i), magnitude));
  }
  const __m256i largest = _mm256_max_epi16(_mm512_castsi512_si256(wide), _mm512_extracti64x4_epi64(wide, 1));
  #else
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    largest = _mm256_max_epi16(largest, _mm256_and_si256(bits, magnitude));
  }
  #endif
  const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  // There is an instruction for the least of eight: of their complements.
  const int least = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)))) & 0xffff;
  return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(0xffff - least)));
}

#endif

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
