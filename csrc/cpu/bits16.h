// 16-bit words of memory as 32-bit lanes, and 16 random bits for each element of an optimizer's tensors.
#pragma once

#include "common/random_place.h"
#include "cpu/philox_vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// Zero-extended.
inline IntVec load_bits(const void* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return bits_as<IntVec>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(CPU_CAPABILITY_AVX2)
  return bits_as<IntVec>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, IntVec);
#endif
}

// The low halves.
inline void store_bits(void* p, IntVec v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits_as<__m512i>(v)));
#else
  const HalfBits bits = __builtin_convertvector(v, HalfBits);
  std::memcpy(p, &bits, sizeof(bits));
#endif
}

// The random bits of 256 neighbours.
class RandomBits {
 public:
  void fill(const RandomPlace& place, int64_t first) {
    const uint32_t counter = place.counter(first);
    UIntVec lanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<uint32_t>(lane);
    for (int64_t part = 0; part < 32; part += kLanes) {
      UIntVec words[4] = {lanes + counter + static_cast<uint32_t>(part), UIntVec{} + place.tensor,
                          UIntVec{} + place.parameter, UIntVec{} + place.step};
      philox(words, place.seed);
      for (int64_t word = 0; word < 4; ++word) {
        std::memcpy(words_[part / 16][word] + part % 16, &words[word], sizeof(words[word]));
      }
    }
  }

  // Of the vector that begins i elements on.
  IntVec at(int64_t i) const {
    IntVec word;
    std::memcpy(&word, words_[i / 128][i % 128 / 32] + i % 16, sizeof(word));
    return (i / 16 % 2 == 0 ? word : word >> 16) & 0xffff;
  }

 private:
  uint32_t words_[2][4][16];
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
