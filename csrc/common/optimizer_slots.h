// What one step of an optimizer works on: the arrays of every parameter of a group.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "random_place.h"

namespace memkernels {

constexpr int kMaxMoments = 2;
// Elements that are worked on together, and that a parameter may be cut at: a multiple of both sizes of blocks.
constexpr int64_t kRun = 256;

struct Slot {
  void* parameter;
  const void* grad;
  void* moments[kMaxMoments];
  float* absmax[kMaxMoments];
  int16_t* remainder;  // null where there is none
  int64_t size, origin;
  bool bfloat16;
  uint32_t index, step;
};

struct Group {
  std::vector<Slot> slots;
  int64_t state_bits;
  uint64_t seed;
  // The gradients are multiplied by both, the learning rate by lr_factor; those that are not null are where the kernel
  // runs.
  float grad_scale;
  const float* grad_factor;
  const float* lr_factor;
};

// Calls body(std::integral_constant<int, bits>()) of the bits of a moment.
template <typename Body>
void with_state_bits(int64_t bits, const Body& body) {
  switch (bits) {
    case 32:
      return body(std::integral_constant<int, 32>());
    case 16:
      return body(std::integral_constant<int, 16>());
    case 8:
      return body(std::integral_constant<int, 8>());
    default:
      return body(std::integral_constant<int, 4>());
  }
}

// Of a slot's parameter (tensor 0) or its moments (from 1 on).
MEMKERNELS_HOST_DEVICE inline RandomPlace random_place(const Slot& slot, uint64_t seed, uint32_t tensor) {
  return {seed, tensor, slot.index, slot.step, slot.origin};
}

}  // namespace memkernels
