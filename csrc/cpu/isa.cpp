// Which instruction set the CPU kernels run with.
#include <cstdlib>
#include <cstring>

#include "common/kernel_table.h"

namespace memkernels {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bf16");
    case Isa::avx2:
      return avx2;
    default:
      return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

Isa best() {
  if (supported(Isa::avx512)) return Isa::avx512;
  return supported(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

Isa& current() {
  static Isa isa = best();
  return isa;
}

}  // namespace

Isa active_isa() {
  return current();
}

}  // namespace memkernels

// Called through ctypes by memkernels/_library.py, which validates MEMKERNELS_CPU before any kernel runs.
extern "C" {

__attribute__((visibility("default"))) const char* memkernels_cpu_isa() {
  return memkernels::kIsaNames[static_cast<int>(memkernels::active_isa())];
}

// Returns 0 when `name` is in use from now on, 1 for an unknown name, 2 where this processor lacks it.
__attribute__((visibility("default"))) int memkernels_set_cpu_isa(const char* name) {
  for (int i = 0; i < memkernels::kIsaCount; ++i) {
    if (std::strcmp(name, memkernels::kIsaNames[i]) == 0) {
      const auto isa = static_cast<memkernels::Isa>(i);
      if (!memkernels::supported(isa)) return 2;
      memkernels::current() = isa;
      return 0;
    }
  }
  return 1;
}
}
