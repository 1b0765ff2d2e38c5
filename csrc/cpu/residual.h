// What a norm normalises: a row of x, or of x + residual.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// The row of `size` elements from `first` on. A sum goes to `sums`, which the caller gets, and is normalised as it is
// there: rounded.
template <typename T>
inline const T* residual_row(const T* x, const T* residual, T* sums, int64_t first, int64_t size) {
  if (residual == nullptr) return x + first;
  const T *row = x + first, *added = residual + first;
  T* sum = sums + first;
  for_each_vec(size, [&](auto at, auto to) { to(sum, at(row) + at(added)); });
  return sum;
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
