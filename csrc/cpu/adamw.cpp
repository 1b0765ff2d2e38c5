// AdamW (Loshchilov & Hutter, arXiv 1711.05101), one step of every parameter of a group:
//   m += (1 - beta1) (g - m)        v = beta2 v + (1 - beta2) g^2        g = grad * grad_scale
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
#include <cmath>

#include "common/kernel_table.h"
#include "cpu/optimizer.h"

namespace memkernels::cpu {
namespace {

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;

  // The update at a step, its constants worked out in double.
  auto at(uint32_t step) const {
    const auto decay = static_cast<float>(1 - lr * weight_decay);
    const auto first = static_cast<float>(1 - beta1), second = static_cast<float>(1 - beta2);
    const auto kept = static_cast<float>(beta2), least = static_cast<float>(eps);
    const auto step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
    const auto correction = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
    return [=](Vec& p, Vec g, Vec& m, Vec& v) {
      m += first * (g - m);
      v = kept * v + second * (g * g);
      p = p * decay - step_size * m / (sqrt(v) * correction + least);
    };
  }
};

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
            std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
            std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
            double grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay) {
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 /*moment_count=*/2);
  const AdamW rule{lr, beta1, beta2, eps, weight_decay};
  const auto scale = static_cast<float>(grad_scale);
  for_each_range(group, [&](const Slot& slot, int64_t first, int64_t last) {
    const auto update = rule.at(slot.step);
    with_parameter(group, slot, [&](const auto* grad, auto parameter) {
      with_moments<true, false>(
          group, slot, [&](auto m, auto v) { update_range(update, first, last, scale, grad, parameter, m, v); });
    });
  });
}

MEMKERNELS_CPU_KERNEL(adamw_);

}  // namespace
}  // namespace memkernels::cpu
