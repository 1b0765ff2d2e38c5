// The activations of feed-forward layers, with their derivatives.
#pragma once

#include <string>

#include "common/tensors.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

struct Activated {
  Vec value;
  Vec derivative;
};

struct Silu {
  static Activated at(Vec x) {
    const Vec s = sigmoid(x), y = x * s;
    return {y, s + y * (1.0f - s)};
  }
};

struct Gelu {
  static Activated at(Vec x) {
    const Normal n = normal(x);
    return {x * n.cdf, n.cdf + x * n.density};
  }
};

// x (1 + tanh u) / 2 = x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static Activated at(Vec x) {
    const Vec squared = x * x;
    const Vec twice_u = 1.59576912f * x * (1.0f + 0.044715f * squared);
    const Vec s = sigmoid(twice_u), y = x * s;
    // sigmoid(-2u), since the cubic would magnify the rounding of 1 - s.
    return {y, s + y * sigmoid(-twice_u) * (1.59576912f * (1.0f + 0.134145f * squared))};
  }
};

// `x <= 0`, not `x > 0`: a NaN comes out as NaN.
struct Relu {
  static Activated at(Vec x) { return {x <= 0.0f ? Vec{} : x, x <= 0.0f ? Vec{} : broadcast(1.0f)}; }
};

struct ReluSquared {
  static Activated at(Vec x) {
    const Vec positive = Relu::at(x).value;
    return {positive * positive, 2.0f * positive};
  }
};

// Calls body.operator()<T, Act>() with T as `dispatch_floating` has it and Act as the activation's name says.
template <typename Body>
void dispatch_activation(const char* name, const Tensor& tensor, const std::string& activation, Body&& body) {
  dispatch_floating(name, tensor, [&]<typename T>() {
    if (activation == "silu") return body.template operator()<T, Silu>();
    if (activation == "gelu") return body.template operator()<T, Gelu>();
    if (activation == "gelu_tanh") return body.template operator()<T, GeluTanh>();
    if (activation == "relu") return body.template operator()<T, Relu>();
    if (activation == "relu_squared") return body.template operator()<T, ReluSquared>();
    STD_TORCH_CHECK(false, "activation: expected silu, gelu, gelu_tanh, relu or relu_squared, got ", activation);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
