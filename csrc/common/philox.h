// Philox 4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").
// W is a 32-bit unsigned integer or a vector of them; W64 the same count of 64-bit ones.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace memkernels {

constexpr uint32_t kPhiloxRoundA = 0xd2511f53, kPhiloxRoundB = 0xcd9e8d57;
constexpr uint32_t kPhiloxKeyA = 0x9e3779b9, kPhiloxKeyB = 0xbb67ae85;

// Replaces counter[4] by four random words. `multiply(a, b, high, low)` gives the two halves of the 64-bit product of a
// constant and a W.
template <typename W, typename Multiply>
MEMKERNELS_HOST_DEVICE inline void philox(W (&counter)[4], uint64_t seed, Multiply&& multiply) {
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

struct WideProduct {
  MEMKERNELS_HOST_DEVICE void operator()(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// Of one counter.
MEMKERNELS_HOST_DEVICE inline void philox(uint32_t (&counter)[4], uint64_t seed) {
  philox(counter, seed, WideProduct());
}

}  // namespace memkernels
