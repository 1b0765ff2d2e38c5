// Elements of small tables, one for each lane.
#pragma once

#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

inline Vec gather(const float* table, IntVec index) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_i32gather_ps(bits_as<__m512i>(index), table, 4);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_i32gather_ps(table, bits_as<__m256i>(index), 4);
#else
  Vec v;
  for (int64_t lane = 0; lane < kLanes; ++lane) v[lane] = table[index[lane]];
  return v;
#endif
}

// table[index % kSize].
template <int kSize>
inline Vec lookup(const float (&table)[kSize], IntVec index) {
  static_assert(kSize == 16 || kSize == 32);
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kSize == 16) {
    return _mm512_permutexvar_ps(bits_as<__m512i>(index), _mm512_loadu_ps(table));
  } else {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), bits_as<__m512i>(index), _mm512_loadu_ps(table + 16));
  }
#else
  return gather(table, index & (kSize - 1));
#endif
}

template <int kSize>
inline IntVec lookup(const int32_t (&table)[kSize], IntVec index) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kSize == 32) {
    return bits_as<IntVec>(
        _mm512_permutex2var_epi32(_mm512_loadu_si512(table), bits_as<__m512i>(index), _mm512_loadu_si512(table + 16)));
  }
#endif
  index &= kSize - 1;
#if defined(CPU_CAPABILITY_AVX2)
  return bits_as<IntVec>(_mm256_i32gather_epi32(table, bits_as<__m256i>(index), 4));
#else
  IntVec v;
  for (int64_t lane = 0; lane < kLanes; ++lane) v[lane] = table[index[lane]];
  return v;
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
