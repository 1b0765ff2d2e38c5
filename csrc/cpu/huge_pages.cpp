// Huge pages for fresh tensors that something else than a kernel fills: torch's products.
#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/outputs.h"

namespace memkernels::cpu {
namespace {

void on_huge_pages_(const Tensor& fresh) {
  STD_TORCH_CHECK(fresh.is_contiguous(), "fresh: expected a contiguous tensor");
  on_huge_pages(fresh);
}

MEMKERNELS_CPU_KERNEL(on_huge_pages_);

}  // namespace
}  // namespace memkernels::cpu
