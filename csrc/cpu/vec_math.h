// Functions of a vector that activations need, on the exp of vec.h.
#pragma once

#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// 1 / (1 + e^-x), to about 2 units in the last place.
inline Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + exp(-x));
}

// 1 / x to about 1 unit in the last place, for normal x whose reciprocal is normal; NaN for NaN.
inline Vec reciprocal(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  // A division holds the unit for longer than the estimate, good to 14 bits, and Newton's step.
  const Vec estimate = _mm512_rcp14_ps(x);
  return estimate * (1.0f - x * estimate) + estimate;
#else
  return 1.0f / x;
#endif
}

struct Normal {
  Vec cdf;
  Vec density;
};

// Distribution function and density of the standard normal distribution. The tail is e^(-x^2/2) t p(t) with
// t = 1 / (1 + 0.21 |x|); p is a minimax fit, relative error 1.6e-8 before rounding, for |x| up to 14, from where on
// the tail is zero in float32. Half of 1 + erf would lose the tail of negative x by cancellation.
inline Normal normal(Vec x) {
  const Vec magnitude = min(broadcast(14.5f), max(x, -x));  // from there on the bell is zero
  const Vec bell = exp2(magnitude * magnitude * -0.721347520f);
  const Vec t = reciprocal(1.0f + 0.21f * magnitude);
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
