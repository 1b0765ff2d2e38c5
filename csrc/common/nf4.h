// NF4, the 4-bit code of Dettmers et al. 2023 (arXiv 2305.14314, appendix E): 16 quantiles of the normal distribution,
// scaled to [-1, 1]. A block of values is stored as its absolute maximum and one code a value; the first of two
// neighbours is the high nibble of their byte.
//   absmax = max |v| of a block        code = the number of midpoints between neighbouring values below v / absmax
//   v = value[code] * absmax           absmax = nested_code[absmax code] * nested_absmax + offset, where it is nested
#pragma once

#include <cstdint>

#include "host_device.h"
#include "least_absmax.h"

namespace memkernels {

constexpr int kNf4Codes = 16;
constexpr int64_t kNf4MaxBlock = 4096;
// Absolute maxima that share a second-level one, where they are stored in 8 bits.
constexpr int64_t kNestedBlock = 256;

// One float a code.
struct Nf4Table {
  float value[kNf4Codes];
};

MEMKERNELS_HOST_DEVICE constexpr Nf4Table nf4_values() {
  return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
           -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
           0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
           1.0f}};
}

// The upper ends of the codes' intervals; that of the last lies above every quotient.
MEMKERNELS_HOST_DEVICE constexpr Nf4Table nf4_midpoints() {
  const Nf4Table values = nf4_values();
  Nf4Table midpoints{};
  for (int i = 0; i + 1 < kNf4Codes; ++i) midpoints.value[i] = (values.value[i] + values.value[i + 1]) / 2;
  midpoints.value[kNf4Codes - 1] = 2.0f;
  return midpoints;
}

// What the absolute maxima of blocks are read from: absmax alone, or the four others.
struct Nf4Scales {
  const float* absmax = nullptr;
  const uint8_t* codes = nullptr;
  const float* nested_absmax = nullptr;
  const float* nested_code = nullptr;
  const float* offset = nullptr;
};

}  // namespace memkernels
