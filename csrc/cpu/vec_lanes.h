// Vectors as the formulas that CPU and CUDA share take them.
#pragma once

#include "cpu/lookup.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

struct VecLanes {
  using Float = Vec;
  using Int = IntVec;

  static Vec sqrt(Vec v) { return cpu::sqrt(v); }
  static Vec min(Vec a, Vec b) { return cpu::min(a, b); }
  static Vec max(Vec a, Vec b) { return cpu::max(a, b); }
  static IntVec ones(IntVec comparison) { return -comparison; }
  static Vec from_int(IntVec v) { return __builtin_convertvector(v, Vec); }
  static IntVec truncated(Vec v) { return __builtin_convertvector(v, IntVec); }
  template <typename T, int kSize>
  static auto lookup(const T (&table)[kSize], IntVec index) {
    return cpu::lookup(table, index);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
