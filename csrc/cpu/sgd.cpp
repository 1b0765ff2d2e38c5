// SGD with momentum as torch.optim.SGD has it, one step of every parameter of a group:
//   g = grad * grad_scale + weight_decay p        b = momentum b + (1 - dampening) g, and g at the first step
//   p -= lr b, or with Nesterov's momentum lr (g + momentum b), or without momentum lr g
#include "common/kernel_table.h"
#include "cpu/optimizer.h"

namespace memkernels::cpu {
namespace {

void sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
          std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
          std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
          double grad_scale, double lr, double momentum_, double dampening, double weight_decay, bool nesterov) {
  const bool has_momentum = momentum_ != 0;
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 has_momentum ? 1 : 0);
  const auto scale = static_cast<float>(grad_scale), step_size = static_cast<float>(lr);
  const auto momentum = static_cast<float>(momentum_), decay = static_cast<float>(weight_decay);
  for_each_range(group, [&](const Slot& slot, int64_t begin, int64_t end) {
    const auto fresh = slot.step == 1 ? 1.0f : static_cast<float>(1 - dampening);
    with_parameter(group, slot, [&](const auto* grad, auto parameter) {
      if (!has_momentum) {
        const auto update = [=](Vec& p, Vec g) { p -= step_size * (g + decay * p); };
        return update_range(update, begin, end, scale, grad, parameter);
      }
      const auto update = [=](Vec& p, Vec g, Vec& b) {
        g += decay * p;
        b = momentum * b + fresh * g;
        p -= step_size * (nesterov ? g + momentum * b : b);
      };
      with_moments<true>(group, slot, [&](auto b) { update_range(update, begin, end, scale, grad, parameter, b); });
    });
  });
}

MEMKERNELS_CPU_KERNEL(sgd_);

}  // namespace
}  // namespace memkernels::cpu
