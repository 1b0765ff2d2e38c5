// bfloat16 with more than its bits: rounded at random, or with the rest of a float32 beside it. 16-bit words come in
// the low half of a lane; what the high half of a result holds does not matter.
#pragma once

#include "lanes.h"

namespace memkernels {

// v in bfloat16: up or down with the probabilities whose mean is v, as 16 random bits added below the last one carry or
// do not.
template <typename Lanes>
MEMKERNELS_HOST_DEVICE inline typename Lanes::Int rounded_at_random(typename Lanes::Float v,
                                                                    typename Lanes::Int random) {
  const auto bits = bits_as<typename Lanes::Int>(v);
  return v == v ? (bits + random) >> 16 : (bits >> 16) | 0x40;
}

// A float32 as the bfloat16 nearest to it, `high` (of two as near the one of larger magnitude), and `low`, its own low
// 16 bits, which say too whether `high` was rounded up. Nothing is lost; a NaN becomes the quiet one.
template <typename Int>
struct Halves {
  Int high, low;
};

template <typename Lanes>
MEMKERNELS_HOST_DEVICE inline Halves<typename Lanes::Int> split(typename Lanes::Float v) {
  using Int = typename Lanes::Int;
  const Int bits = v == v ? bits_as<Int>(v) : Int{} + 0x7fc00000;
  return {(bits + 0x8000) >> 16, bits};
}

// Of zero-extended halves.
template <typename Lanes>
MEMKERNELS_HOST_DEVICE inline typename Lanes::Float join(typename Lanes::Int high, typename Lanes::Int low) {
  return bits_as<typename Lanes::Float>((high << 16) + ((low ^ 0x8000) - 0x8000));
}

}  // namespace memkernels
