// SGD with momentum as torch.optim.SGD has it, one step of a parameter, g the gradient as it counts:
//   g = g + weight_decay p        b = momentum b + (1 - dampening) g, and g at the first step
//   p -= lr b, or with Nesterov's momentum lr (g + momentum b), or without momentum lr g
#pragma once

#include <cstdint>

#include "lanes.h"

namespace memkernels {

// A step's constants.
struct SGDUpdate {
  float step_size, momentum, fresh, decay;
  bool nesterov;

  // Without momentum.
  template <typename Lanes, typename Float = typename Lanes::Float>
  MEMKERNELS_HOST_DEVICE void apply(Float& p, Float g) const {
    p -= step_size * (g + decay * p);
  }

  template <typename Lanes, typename Float = typename Lanes::Float>
  MEMKERNELS_HOST_DEVICE void apply(Float& p, Float g, Float& b) const {
    g += decay * p;
    b = momentum * b + fresh * g;
    p -= step_size * (nesterov ? g + momentum * b : b);
  }

  // With the learning rate times `factor`.
  MEMKERNELS_HOST_DEVICE SGDUpdate scaled(float factor) const {
    SGDUpdate update = *this;
    update.step_size = step_size * factor;
    return update;
  }
};

struct SGD {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;

  SGDUpdate at(uint32_t step) const {
    return {.step_size = static_cast<float>(lr),
            .momentum = static_cast<float>(momentum),
            .fresh = step == 1 ? 1.0f : static_cast<float>(1 - dampening),
            .decay = static_cast<float>(weight_decay),
            .nesterov = nesterov};
  }
};

}  // namespace memkernels
