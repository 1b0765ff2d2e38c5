// Lion, one step of every parameter of a group.
#include "common/lion.h"

#include "common/kernel_table.h"
#include "cpu/optimizer.h"

namespace memkernels::cpu {
namespace {

void lion_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
           std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
           std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
           double grad_scale, std::optional<Tensor> grad_factor, std::optional<Tensor> lr_factor, double lr,
           double beta1, double beta2, double weight_decay) {
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 grad_scale, grad_factor, lr_factor, /*moment_count=*/1);
  step_group<true>(group, Lion{lr, beta1, beta2, weight_decay});
}

MEMKERNELS_CPU_KERNEL(lion_);

}  // namespace
}  // namespace memkernels::cpu
