// SGD on CUDA tensors, one step of every parameter of a group.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_tensors.h"
#include "../common/optimizer_group.h"
#include "../common/sgd.h"
#include "optimizer.cuh"

namespace memkernels::cuda {
namespace {

void sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
          std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
          std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
          double grad_scale, std::optional<Tensor> grad_factor, std::optional<Tensor> lr_factor, double lr,
          double momentum, double dampening, double weight_decay, bool nesterov) {
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 grad_scale, grad_factor, lr_factor, /*moment_count=*/momentum == 0 ? 0 : 1);
  if (params.empty()) return;
  const SGD rule{lr, momentum, dampening, weight_decay, nesterov};
  const StreamOf stream(params[0]);
  if (momentum == 0) {
    launch_optimizer_step<>(group, rule, stream);
  } else {
    launch_optimizer_step<true>(group, rule, stream);
  }
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("sgd_", TORCH_BOX(&sgd_));
}

}  // namespace
}  // namespace memkernels::cuda
