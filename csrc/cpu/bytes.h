// kLanes bytes of memory as 32-bit lanes. The compiler's own conversion goes through every byte by itself.
#pragma once

#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

typedef uint8_t LaneBytes __attribute__((vector_size(kLanes)));

inline IntVec load_bytes(const uint8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return bits_as<IntVec>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(CPU_CAPABILITY_AVX2)
  return bits_as<IntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  LaneBytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, IntVec);
#endif
}

// Of numbers from 0 to 255.
inline void store_bytes(uint8_t* p, IntVec v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bits_as<__m512i>(v)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i words = bits_as<__m256i>(v);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
#else
  const LaneBytes bytes = __builtin_convertvector(v, LaneBytes);
  std::memcpy(p, &bytes, sizeof(bytes));
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
