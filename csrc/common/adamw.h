// AdamW (Loshchilov & Hutter, arXiv 1711.05101), one step of a parameter, g the gradient as it counts:
//   m += (1 - beta1) (g - m)        v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace memkernels {

// A step's constants.
struct AdamWUpdate {
  float decay, first, kept, second, step_size, correction, least;

  template <typename Lanes, typename Float = typename Lanes::Float>
  MEMKERNELS_HOST_DEVICE void apply(Float& p, Float g, Float& m, Float& v) const {
    m += first * (g - m);
    v = kept * v + second * (g * g);
    p = p * decay - step_size * m / (Lanes::sqrt(v) * correction + least);
  }

  // With the learning rate times `factor`.
  MEMKERNELS_HOST_DEVICE AdamWUpdate scaled(float factor) const {
    AdamWUpdate update = *this;
    update.decay = 1.0f - (1.0f - decay) * factor;
    update.step_size = step_size * factor;
    return update;
  }
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;

  // The constants are worked out in double.
  AdamWUpdate at(uint32_t step) const {
    return {.decay = static_cast<float>(1 - lr * weight_decay),
            .first = static_cast<float>(1 - beta1),
            .kept = static_cast<float>(beta2),
            .second = static_cast<float>(1 - beta2),
            .step_size = static_cast<float>(lr / (1 - std::pow(beta1, step))),
            .correction = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step))),
            .least = static_cast<float>(eps)};
  }
};

}  // namespace memkernels
