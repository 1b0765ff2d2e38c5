// One operator, several builds of its kernel: each kernel file is compiled once per instruction set that it gains by
// and enters its boxed function here; csrc/library.cpp registers `call`, which runs the build for what is active, or
// the next lower one.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace memkernels {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };
constexpr int kIsaCount = 4;
constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512", "amx"};

// The instruction set in use: the best that both the processor and this library have, or what MEMKERNELS_CPU names.
Isa active_isa();

// That an operator has a build of its own for an instruction set.
void note_build(const char* name, Isa isa);

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

// A string literal as a template argument.
template <size_t N>
struct OperatorName {
  char text[N];
  constexpr OperatorName(const char (&literal)[N]) { std::copy_n(literal, N, text); }
};

template <OperatorName name>
struct KernelTable {
  static inline BoxedKernel builds[kIsaCount] = {};

  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    int isa = static_cast<int>(active_isa());
    while (builds[isa] == nullptr) --isa;
    builds[isa](stack, inputs, outputs);
  }

  struct Entry {
    Entry(Isa isa, BoxedKernel kernel) {
      builds[static_cast<int>(isa)] = kernel;
      note_build(name.text, isa);
    }
  };
};

}  // namespace memkernels

#if defined(CPU_CAPABILITY_AMX)
  #define MEMKERNELS_ISA ::memkernels::Isa::amx
#elif defined(CPU_CAPABILITY_AVX512)
  #define MEMKERNELS_ISA ::memkernels::Isa::avx512
#elif defined(CPU_CAPABILITY_AVX2)
  #define MEMKERNELS_ISA ::memkernels::Isa::avx2
#else
  #define MEMKERNELS_ISA ::memkernels::Isa::baseline
#endif

// At file scope of csrc/cpu/<op>.cpp: this build's kernel for the operator of the same name.
#define MEMKERNELS_CPU_KERNEL(function) \
  static const ::memkernels::KernelTable<#function>::Entry function##_entry(MEMKERNELS_ISA, TORCH_BOX(&function))
