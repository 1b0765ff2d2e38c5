// Which instruction set the CPU kernels run with.
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "common/kernel_table.h"

#if defined(__x86_64__)
  #include <cpuid.h>
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

namespace memkernels {
namespace {

#if defined(__x86_64__)
// Whether the processor has AMX for BFloat16, and Linux lets this process use its registers, for which it has to ask.
bool has_amx() {
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kBfloat16) == 0 || (edx & kTiles) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::amx:
      return supported(Isa::avx512) && has_amx();
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
  for (const Isa isa : {Isa::amx, Isa::avx512, Isa::avx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::baseline;
}

Isa& current() {
  static Isa isa = best();
  return isa;
}

std::set<std::pair<std::string, Isa>>& builds() {
  static std::set<std::pair<std::string, Isa>> noted;
  return noted;
}

}  // namespace

Isa active_isa() {
  return current();
}

void note_build(const char* name, Isa isa) {
  builds().emplace(name, isa);
}

}  // namespace memkernels

// Called through ctypes by memkernels/_library.py, which validates MEMKERNELS_CPU before any kernel runs.
extern "C" {

__attribute__((visibility("default"))) const char* memkernels_cpu_isa() {
  return memkernels::kIsaNames[static_cast<int>(memkernels::active_isa())];
}

// Whether an operator has a build of its own for what is in use.
__attribute__((visibility("default"))) int memkernels_has_build(const char* name) {
  return memkernels::builds().count({name, memkernels::active_isa()}) != 0;
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
