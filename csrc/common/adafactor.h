// Adafactor (Shazeer & Stern, arXiv 1804.04235). Of the gradient g of matrices (B, M, N), one after the other:
//   u_bij = g_bij min(rows_bi columns_bj, most)        g over the root of its second moment
//   m = beta1 m + (1 - beta1) u                        p -= lr weight_decay p + m, without a moment u
#pragma once

#include <cstdint>

#include "lanes.h"

namespace memkernels {

struct Matrices {
  int64_t count, rows, width;
};

struct Factors {
  const float *rows, *columns;
  Matrices of;
  float most;
};

// A step's constants; u is scaled as it counts.
struct AdafactorUpdate {
  float decay, beta1, fresh;

  template <typename Lanes, typename Float = typename Lanes::Float>
  MEMKERNELS_HOST_DEVICE void apply(Float& p, Float u) const {
    p -= decay * p + u;
  }

  template <typename Lanes, typename Float = typename Lanes::Float>
  MEMKERNELS_HOST_DEVICE void apply(Float& p, Float u, Float& m) const {
    m = beta1 * m + fresh * u;
    p -= decay * p + m;
  }

  // With the learning rate times `factor`.
  MEMKERNELS_HOST_DEVICE AdafactorUpdate scaled(float factor) const { return {decay * factor, beta1, fresh}; }
};

struct Adafactor {
  double lr, beta1, weight_decay;

  AdafactorUpdate at(uint32_t) const {
    return {static_cast<float>(lr * weight_decay), static_cast<float>(beta1), static_cast<float>(1 - beta1)};
  }
};

}  // namespace memkernels
