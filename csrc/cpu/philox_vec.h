// Philox over vectors: each lane has a counter of its own.
#pragma once

#include "common/philox.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

typedef uint32_t UIntVec __attribute__((vector_size(kLanes * 4)));
// Every other word of a UIntVec, in the low half of a 64-bit lane. What the high half holds does not matter.
typedef uint64_t SpreadVec __attribute__((vector_size(kLanes * 4)));

// The 64-bit products of a and the low halves.
inline SpreadVec multiply(uint32_t a, SpreadVec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return bits_as<SpreadVec>(_mm512_mul_epu32(bits_as<__m512i>(b), _mm512_set1_epi32(static_cast<int>(a))));
#elif defined(CPU_CAPABILITY_AVX2)
  return bits_as<SpreadVec>(_mm256_mul_epu32(bits_as<__m256i>(b), _mm256_set1_epi32(static_cast<int>(a))));
#else
  return (b & 0xffffffffu) * static_cast<uint64_t>(a);
#endif
}

// Even and odd lanes go through all rounds apart: a product's low half may then stay where it is, with its high half
// above it, and the two chains of products, whose latency bounds a round, overlap.
inline void philox(UIntVec (&counter)[4], uint64_t seed) {
  const auto product = [](uint32_t a, SpreadVec b, SpreadVec& high, SpreadVec& low) {
    low = multiply(a, b);
    high = low >> 32;
  };
  SpreadVec even[4], odd[4];
  for (int word = 0; word < 4; ++word) {
    even[word] = bits_as<SpreadVec>(counter[word]);
    odd[word] = even[word] >> 32;
  }
  memkernels::philox(even, seed, product);
  memkernels::philox(odd, seed, product);
  for (int word = 0; word < 4; ++word) {
    counter[word] = bits_as<UIntVec>((even[word] & 0xffffffffu) | (odd[word] << 32));
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
