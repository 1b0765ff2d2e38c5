// Muon's momentum on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_tensors.h"
#include "../common/optimizer_group.h"
#include "muon.cuh"

namespace memkernels::cuda {
namespace {

// Of one matrix: direction, bfloat16, is what its gradient and momentum give.
void muon_momentum_(Tensor direction, std::vector<Tensor> grads, std::vector<Tensor> moments,
                    std::vector<Tensor> absmax, std::vector<int64_t> steps, std::vector<int64_t> indices,
                    std::vector<int64_t> origins, int64_t seed, int64_t state_bits, double grad_scale,
                    std::optional<Tensor> grad_factor, double momentum, bool nesterov) {
  STD_TORCH_CHECK(grads.size() == 1, "grads: expected one, got ", grads.size());
  const ScalarType dtype = grads[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "grads[0]: expected float32 or bfloat16, got dtype ", toString(dtype));
  check_array("grads", 0, grads[0], dtype, grads[0].numel());
  check_dtype("direction", direction, ScalarType::BFloat16);
  check_shape("direction", direction, grads[0].sizes());
  check_device("direction", direction, grads[0]);
  STD_TORCH_CHECK(direction.is_contiguous(), "direction: expected a contiguous tensor");
  Group group = make_group(grads, grads, moments, absmax, {}, steps, indices, origins, seed, state_bits, grad_scale,
                           grad_factor, std::nullopt, /*moment_count=*/1);
  group.slots[0].parameter = direction.mutable_data_ptr();
  const StreamOf stream(grads[0]);
  if (dtype == ScalarType::Float) {
    launch_muon_momentum<float>(group, momentum, nesterov, stream);
  } else {
    launch_muon_momentum<uint16_t>(group, momentum, nesterov, stream);
  }
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("muon_momentum_", TORCH_BOX(&muon_momentum_));
}

}  // namespace
}  // namespace memkernels::cuda
