// Where an optimizer's random bits come from: 16 for each element of a tensor in a step.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace memkernels {

// The elements of one tensor in one step, from its element `origin` on. The bits of element e of the tensor are half
// e / 16 % 2 (the low one first) of word e % 128 / 32 of Philox at the counter (e / 128 * 16 + e % 16, tensor,
// parameter, step): 16 counters in a row serve 128 elements.
struct RandomPlace {
  uint64_t seed;
  uint32_t tensor, parameter, step;
  int64_t origin;

  // The first of the 16 counters of the 128 elements that origin + first is among.
  MEMKERNELS_HOST_DEVICE uint32_t counter(int64_t first) const {
    return static_cast<uint32_t>((origin + first) / 128 * 16);
  }
};

}  // namespace memkernels
