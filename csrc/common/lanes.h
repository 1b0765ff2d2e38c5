// Formulas that CPU and CUDA kernels share are templates over a `Lanes`: a vector of floats on CPU (VecLanes), one
// float on CUDA (OneLane). It has
//   Float, Int             32 bits a lane; arithmetic, comparison and `?:` are the built-in operators
//   sqrt(Float)
//   min(a, b), max(a, b)   b where either is NaN
//   ones(comparison)       Int: 1 where it holds, 0 elsewhere
//   from_int(Int), truncated(Float)
//   lookup(table, Int)     table[index % size], of 16 or 32 elements
#pragma once

#include <cstring>

#include "host_device.h"

namespace memkernels {

template <typename To, typename From>
MEMKERNELS_HOST_DEVICE inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace memkernels
