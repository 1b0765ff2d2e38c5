// Lion (Chen et al. 2023, arXiv 2302.06675), one step of a parameter, g the gradient as it counts:
//   p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g
#pragma once

#include <cstdint>

#include "lanes.h"

namespace memkernels {

// -1, 0 or 1; NaN for NaN.
template <typename Lanes, typename Float = typename Lanes::Float>
MEMKERNELS_HOST_DEVICE inline Float sign(Float v) {
  const auto bits = bits_as<typename Lanes::Int>(v);
  const Float one = bits_as<Float>((bits & static_cast<int32_t>(0x80000000)) | 0x3f800000);
  return v < 0.0f || v > 0.0f ? one : v;
}

// A step's constants.
struct LionUpdate {
  float decay, step_size, first, second;

  template <typename Lanes, typename Float = typename Lanes::Float>
  MEMKERNELS_HOST_DEVICE void apply(Float& p, Float g, Float& m) const {
    p = p * decay - step_size * sign<Lanes>(m + first * (g - m));
    m += second * (g - m);
  }

  // With the learning rate times `factor`.
  MEMKERNELS_HOST_DEVICE LionUpdate scaled(float factor) const {
    LionUpdate update = *this;
    update.decay = 1.0f - (1.0f - decay) * factor;
    update.step_size = step_size * factor;
    return update;
  }
};

struct Lion {
  double lr, beta1, beta2, weight_decay;

  // The same at every step.
  LionUpdate at(uint32_t) const {
    return {.decay = static_cast<float>(1 - lr * weight_decay),
            .step_size = static_cast<float>(lr),
            .first = static_cast<float>(1 - beta1),
            .second = static_cast<float>(1 - beta2)};
  }
};

}  // namespace memkernels
