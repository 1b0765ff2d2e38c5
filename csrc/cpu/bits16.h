// 16-bit words of memory as 32-bit lanes, and bfloat16 with more than its bits: rounded at random, or with the rest of
// a float32 beside it.
#pragma once

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

// A float32 as the bfloat16 nearest to it, `high` (of two as near the one of larger magnitude), and `low`, its own low
// 16 bits, which say too whether `high` was rounded up. Nothing is lost; a NaN becomes the quiet one.
inline Vec join(IntVec high, IntVec low) {
  return bits_as<Vec>((high << 16) + ((low ^ 0x8000) - 0x8000));
}

inline void split(Vec v, void* high, void* low) {
  const IntVec bits = v == v ? bits_as<IntVec>(v) : IntVec{} + 0x7fc00000;
  store_bits(high, (bits + 0x8000) >> 16);
  store_bits(low, bits);
}

// A generator's place in an optimizer: the elements of one tensor in one step, from its element `origin` on.
struct RandomPlace {
  uint64_t seed;
  uint32_t tensor, parameter, step;
  int64_t origin;
};

// 16 random bits for each of 256 neighbours, the first of them a multiple of 256, as the origin is: those of element e
// of the tensor are half e / 16 % 2 (the low one first) of word e % 128 / 32 of Philox at the counter (e / 128 * 16 +
// e % 16, tensor, parameter, step).
class RandomBits {
 public:
  void fill(const RandomPlace& place, int64_t first) {
    const int64_t counter = (place.origin + first) / 8;
    UIntVec lanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<uint32_t>(lane);
    for (int64_t part = 0; part < 32; part += kLanes) {
      UIntVec words[4] = {lanes + static_cast<uint32_t>(counter + part), UIntVec{} + place.tensor,
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

// v in bfloat16: up or down with the probabilities whose mean is v, as 16 random bits added below the last one carry or
// do not.
inline void store_stochastic(BFloat16* p, Vec v, IntVec random) {
  const IntVec bits = bits_as<IntVec>(v);
  store_bits(p, v == v ? (bits + random) >> 16 : (bits >> 16) | 0x40);
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
