// AdamW on CUDA tensors, one step of every parameter of a group.
#include <torch/csrc/stable/library.h>

#include "../common/adamw.h"
#include "../common/cuda_tensors.h"
#include "../common/optimizer_group.h"
#include "optimizer.cuh"

namespace memkernels::cuda {
namespace {

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
            std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
            std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
            double grad_scale, std::optional<Tensor> grad_factor, std::optional<Tensor> lr_factor, double lr,
            double beta1, double beta2, double eps, double weight_decay) {
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 grad_scale, grad_factor, lr_factor, /*moment_count=*/2);
  if (params.empty()) return;
  const StreamOf stream(params[0]);
  launch_optimizer_step<true, false>(group, AdamW{lr, beta1, beta2, eps, weight_decay}, stream);
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("adamw_", TORCH_BOX(&adamw_));
}

}  // namespace
}  // namespace memkernels::cuda
