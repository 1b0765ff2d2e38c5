// Philox over vectors: each lane has a counter of its own.
#pragma once

#include "common/philox.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

typedef uint32_t UIntVec __attribute__((vector_size(kLanes * 4)));
typedef uint64_t WideVec __attribute__((vector_size(kLanes * 8)));

// The two halves of a * b. Even and odd lanes are multiplied apart, as the processor's 64-bit products take them.
inline void multiply(uint32_t a, UIntVec b, UIntVec& high, UIntVec& low) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(a)), even = bits_as<__m512i>(b);
  const __m512i of_even = _mm512_mul_epu32(even, factor);
  const __m512i of_odd = _mm512_mul_epu32(_mm512_srli_epi64(even, 32), factor);
  high = bits_as<UIntVec>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(of_even, 32), of_odd));
  low = bits_as<UIntVec>(_mm512_mask_blend_epi32(0xaaaa, of_even, _mm512_slli_epi64(of_odd, 32)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(a)), even = bits_as<__m256i>(b);
  const __m256i of_even = _mm256_mul_epu32(even, factor);
  const __m256i of_odd = _mm256_mul_epu32(_mm256_srli_epi64(even, 32), factor);
  high = bits_as<UIntVec>(_mm256_blend_epi32(_mm256_srli_epi64(of_even, 32), of_odd, 0xaa));
  low = bits_as<UIntVec>(_mm256_blend_epi32(of_even, _mm256_slli_epi64(of_odd, 32), 0xaa));
#else
  const WideVec product = __builtin_convertvector(b, WideVec) * a;
  high = __builtin_convertvector(product >> 32, UIntVec);
  low = __builtin_convertvector(product, UIntVec);
#endif
}

inline void philox(UIntVec (&counter)[4], uint64_t seed) {
  memkernels::philox(counter, seed,
                     [](uint32_t a, UIntVec b, UIntVec& high, UIntVec& low) { multiply(a, b, high, low); });
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
