// Codes of four bits: two neighbours in a byte, the first in its high half.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

typedef uint64_t PairVec __attribute__((vector_size(kLanes * 4)));
typedef uint8_t PairBytes __attribute__((vector_size(kLanes / 2)));

// kLanes bytes of twice as many codes.
inline void store_nibbles(uint8_t* packed, IntVec first, IntVec second) {
#if defined(CPU_CAPABILITY_AVX512)
  // Neighbours become one 32-bit lane each: in each quarter of the vector two of `first` and then two of `second`.
  const __m512i codes = _mm512_packs_epi32(bits_as<__m512i>(first), bits_as<__m512i>(second));
  const __m512i pairs = _mm512_madd_epi16(codes, _mm512_set1_epi32(0x00010010));
  const __m128i order = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
  const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(pairs), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), bytes);
#elif defined(CPU_CAPABILITY_AVX2)
  // Neighbours become one 32-bit lane each: in either half of the vector two of `first` and then two of `second`.
  const __m256i codes = _mm256_packs_epi32(bits_as<__m256i>(first), bits_as<__m256i>(second));
  const __m256i pairs = _mm256_madd_epi16(codes, _mm256_set1_epi32(0x00010010));
  const __m256i low_bytes = _mm256_shuffle_epi8(pairs, _mm256_set1_epi32(0x0c080400));
  const __m128i low = _mm256_castsi256_si128(low_bytes), high = _mm256_extracti128_si256(low_bytes, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm_unpacklo_epi16(low, high));
#else
  // Two neighbours are one 64-bit lane, the first its low half.
  for (const IntVec& codes : {first, second}) {
    const PairVec pairs = bits_as<PairVec>(codes);
    const PairBytes bytes = __builtin_convertvector((pairs << 4) | (pairs >> 32), PairBytes);
    std::memcpy(packed, &bytes, sizeof(bytes));
    packed += sizeof(bytes);
  }
#endif
}

// The values of a block's sixteen codes, and their lookup.
template <typename T>
class NibbleValues {
 public:
  NibbleValues(const float (&code)[16], float absmax) {
    for (int64_t i = 0; i < 16; i += kLanes) store(values_ + i, load(code + i) * absmax);
#if defined(CPU_CAPABILITY_AVX512)
    const Vec scaled = load(code) * absmax;
    if constexpr (std::is_same_v<T, float>) {
      table_ = bits_as<__m512i>(scaled);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      table_ = _mm512_broadcast_i64x4(bits_as<__m256i>(_mm512_cvtneps_pbh(scaled)));
    } else {
      table_ = _mm512_broadcast_i64x4(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
  }

  T operator[](int code) const { return values_[code]; }

  // out[2 i] and out[2 i + 1] of byte i.
  void expand(const uint8_t* packed, T* out, int64_t bytes) const {
    int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
    // A byte goes into both halves of a lane, shifted in the lower; a lookup takes the low bits of its index alone, of
    // 16 floats four, and of 16 values twice over five.
    for (; i + kBytes <= bytes; i += kBytes) {
      __m512i values;
      if constexpr (std::is_same_v<T, float>) {
        const __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(pair, 4), _mm512_slli_epi64(pair, 32));
        values = _mm512_permutexvar_epi32(index, table_);
      } else {
        const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(pair, 4), _mm512_slli_epi32(pair, 16));
        values = _mm512_permutexvar_epi16(index, table_);
      }
      _mm512_storeu_si512(out + 2 * i, values);
    }
#endif
    for (; i < bytes; ++i) {
      out[2 * i] = values_[packed[i] >> 4];
      out[2 * i + 1] = values_[packed[i] & 15];
    }
  }

 private:
  T values_[16];
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int64_t kBytes = 32 / sizeof(T);
  __m512i table_;
#endif
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
