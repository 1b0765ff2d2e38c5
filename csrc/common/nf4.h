// NF4, the 4-bit code of Dettmers et al. 2023 (arXiv 2305.14314, appendix E): 16 quantiles of the normal distribution,
// scaled to [-1, 1]. A block of values is stored as its absolute maximum and one code a value; the first of two
// neighbours is the high nibble of their byte.
#pragma once

#include <cstdint>

namespace memkernels {

constexpr int kNf4Codes = 16;
constexpr int64_t kNf4MaxBlock = 4096;
// Absolute maxima that share a second-level one, where they are stored in 8 bits.
constexpr int64_t kNestedBlock = 256;
// Absolute maxima below this count as this when they divide: the reciprocal stays finite.
constexpr float kLeastAbsmax = 1e-38f;

#define MEMKERNELS_NF4_VALUES                                                                         \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f

}  // namespace memkernels
