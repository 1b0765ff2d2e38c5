// Functions of a vector that activations need, on the exp of vec.h.
#pragma once

#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// 1 / (1 + e^-x), to about 2 units in the last place.
inline Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + exp(-x));
}

struct Normal {
  Vec cdf;
  Vec density;
};

// Distribution function and density of the standard normal distribution. The tail is e^(-x^2/2) t p(t) with
// t = 1 / (1 + 0.21 |x|); p is a minimax fit, relative error 1.6e-8 before rounding, for |x| up to 14, where the tail
// is zero in float32. Half of 1 + erf would lose the tail of negative x by cancellation.
inline Normal normal(Vec x) {
  const Vec bell = exp(x * x * -0.5f);
  const Vec t = 1.0f / (1.0f + 0.21f * max(x, -x));
  Vec p = broadcast(-0.0716562793f);
  p = p * t + 0.28358841f;
  p = p * t - 0.330253094f;
  p = p * t + 0.349400699f;
  p = p * t - 0.0939249918f;
  p = p * t + 0.12487264f;
  p = p * t + 0.0691921934f;
  p = p * t + 0.0850688517f;
  p = p * t + 0.0837115794f;
  const Vec tail = bell * t * p;
  return {x > 0.0f ? 1.0f - tail : tail, bell * 0.39894228f};
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
