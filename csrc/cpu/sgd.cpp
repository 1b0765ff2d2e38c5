// SGD with momentum, one step of every parameter of a group.
#include "common/sgd.h"

#include "common/kernel_table.h"
#include "cpu/optimizer.h"

namespace memkernels::cpu {
namespace {

void sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
          std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
          std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
          double grad_scale, std::optional<Tensor> grad_factor, std::optional<Tensor> lr_factor, double lr,
          double momentum, double dampening, double weight_decay, bool nesterov) {
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 grad_scale, grad_factor, lr_factor, /*moment_count=*/momentum == 0 ? 0 : 1);
  const SGD rule{lr, momentum, dampening, weight_decay, nesterov};
  if (momentum == 0) {
    step_group<>(group, rule);
  } else {
    step_group<true>(group, rule);
  }
}

MEMKERNELS_CPU_KERNEL(sgd_);

}  // namespace
}  // namespace memkernels::cpu
