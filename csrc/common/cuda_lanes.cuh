// One float as the formulas that CPU and CUDA share take it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lanes.h"

namespace memkernels::cuda {

struct OneLane {
  using Float = float;
  using Int = int32_t;

  MEMKERNELS_HOST_DEVICE static float sqrt(float v) { return sqrtf(v); }
  MEMKERNELS_HOST_DEVICE static float min(float a, float b) { return a < b ? a : b; }
  MEMKERNELS_HOST_DEVICE static float max(float a, float b) { return a > b ? a : b; }
  MEMKERNELS_HOST_DEVICE static int32_t ones(bool comparison) { return comparison ? 1 : 0; }
  MEMKERNELS_HOST_DEVICE static float from_int(int32_t v) { return static_cast<float>(v); }
  MEMKERNELS_HOST_DEVICE static int32_t truncated(float v) { return static_cast<int32_t>(v); }
  template <typename T, int kSize>
  MEMKERNELS_HOST_DEVICE static T lookup(const T (&table)[kSize], int32_t index) {
    return table[index & (kSize - 1)];
  }
};

}  // namespace memkernels::cuda
