// Philox 4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").
// W is a 32-bit unsigned integer or a vector of them; W64 the same count of 64-bit ones.
#pragma once

#include <cstdint>

namespace memkernels {

constexpr uint32_t kPhiloxRoundA = 0xd2511f53, kPhiloxRoundB = 0xcd9e8d57;
constexpr uint32_t kPhiloxKeyA = 0x9e3779b9, kPhiloxKeyB = 0xbb67ae85;

// Replaces counter[4] by four random words. `multiply(a, b, high, low)` gives the two halves of the 64-bit product of a
// constant and a W.
template <typename W, typename Multiply>
inline void philox(W (&counter)[4], uint64_t seed, Multiply&& multiply) {
  uint32_t key_a = static_cast<uint32_t>(seed), key_b = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    W high_a, low_a, high_b, low_b;
    multiply(kPhiloxRoundA, counter[0], high_a, low_a);
    multiply(kPhiloxRoundB, counter[2], high_b, low_b);
    counter[0] = high_b ^ counter[1] ^ key_a;
    counter[1] = low_b;
    counter[2] = high_a ^ counter[3] ^ key_b;
    counter[3] = low_a;
    key_a += kPhiloxKeyA;
    key_b += kPhiloxKeyB;
  }
}

}  // namespace memkernels
