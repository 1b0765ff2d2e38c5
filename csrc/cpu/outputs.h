// Fresh tensors for a kernel's results.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensors.h"

#if defined(__linux__)
  #include <sys/mman.h>
#endif

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// From here on fresh memory is the allocator's own mapping or may be: its pages fault in one by one as they are
// written.
constexpr int64_t kHugePageBytes = 4 << 20;

// Asks for huge pages, where the system grants them on request ("madvise"): faulting in small ones takes longer than
// writing the result (`python -m memkernels.bench gated_activation --case float32` with and without). It is a hint, so
// what it returns does not matter.
inline Tensor on_huge_pages(Tensor fresh) {
#if defined(__linux__)
  const int64_t bytes = fresh.numel() * static_cast<int64_t>(fresh.element_size());
  if (bytes >= kHugePageBytes) {
    constexpr uintptr_t kPage = 4096;
    const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

// Of the shape, strides and dtype of `like`.
inline Tensor output_like(const Tensor& like) {
  return on_huge_pages(torch::stable::empty_like(like));
}

// Contiguous, on `like`'s device and, without one of its own, of its dtype.
inline Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return on_huge_pages(torch::stable::new_empty(like, sizes, dtype));
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
