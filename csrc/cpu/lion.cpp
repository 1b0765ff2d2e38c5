// Lion (Chen et al. 2023, arXiv 2302.06675), one step of every parameter of a group, g = grad * grad_scale:
//   p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g
#include "common/kernel_table.h"
#include "cpu/optimizer.h"

namespace memkernels::cpu {
namespace {

// -1, 0 or 1; NaN for NaN.
inline Vec sign(Vec v) {
  const Vec one = bits_as<Vec>((bits_as<IntVec>(v) & static_cast<int32_t>(0x80000000)) | 0x3f800000);
  return v < 0.0f || v > 0.0f ? one : v;
}

void lion_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
           std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
           std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
           double grad_scale, double lr, double beta1, double beta2, double weight_decay) {
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 /*moment_count=*/1);
  const auto scale = static_cast<float>(grad_scale), decay = static_cast<float>(1 - lr * weight_decay);
  const auto step_size = static_cast<float>(lr);
  const auto first = static_cast<float>(1 - beta1), second = static_cast<float>(1 - beta2);
  const auto update = [=](Vec& p, Vec g, Vec& m) {
    p = p * decay - step_size * sign(m + first * (g - m));
    m += second * (g - m);
  };
  for_each_range(group, [&](const Slot& slot, int64_t begin, int64_t end) {
    with_parameter(group, slot, [&](const auto* grad, auto parameter) {
      with_moments<true>(group, slot, [&](auto m) { update_range(update, begin, end, scale, grad, parameter, m); });
    });
  });
}

MEMKERNELS_CPU_KERNEL(lion_);

}  // namespace
}  // namespace memkernels::cpu
