// Dropout over the rows of a matrix by a mask that is made anew from the seed wherever it is needed:
//   out = m * x / (1 - p)        y += m * term / (1 - p)
// m keeps an element if its random word reaches the threshold.
#include <algorithm>
#include <cmath>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/outputs.h"
#include "cpu/row_words.h"

namespace memkernels::cpu {
namespace {

struct Mask {
  uint64_t seed;
  uint32_t threshold;
  float scale;

  Mask(int64_t seed_, double p)
      : seed(static_cast<uint64_t>(seed_)),
        threshold(static_cast<uint32_t>(std::min(4294967295.0, std::floor(std::ldexp(p, 32))))),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}

  // Calls body(offset, keep) for the vectors of a row of `size` columns, the last of them perhaps incomplete.
  template <typename Body>
  void for_each(int64_t row, int64_t size, Body&& body) const {
    for_each_word(seed, row, size,
                  [&](int64_t offset, UIntVec word) { body(offset, static_cast<IntVec>(word >= threshold)); });
  }
};

inline Vec kept(Vec v, IntVec keep) {
  return bits_as<Vec>(bits_as<IntVec>(v) & keep);
}

Tensor row_dropout(const Tensor& x_in, const Tensor& seed, double p, int64_t first_row, ScalarType dtype) {
  check_dim("x", x_in, 2);
  check_one_element("seed", seed, ScalarType::Long);
  check_probability("dropout_p", p);
  const Tensor x = as_contiguous(x_in);
  Tensor out = new_output(x, x.sizes(), dtype);
  const int64_t rows = x.size(0), size = x.size(1);
  const Mask mask(*seed.const_data_ptr<int64_t>(), p);
  dispatch_floating("x", x, "dtype", dtype, [&]<typename T, typename W>() {
    const T* from = x.const_data_ptr<T>();
    W* to = out.mutable_data_ptr<W>();
    for_each_row(rows, size, [=](int64_t row) {
      const T* x_row = from + row * size;
      W* out_row = to + row * size;
      mask.for_each(first_row + row, size, [=](int64_t i, IntVec keep) {
        store_upto(out_row + i, kept(load_upto(x_row + i, size - i) * mask.scale, keep), size - i);
      });
    });
  });
  return out;
}

void row_dropout_add_(Tensor y, const Tensor& term_in, const Tensor& seed, double p, int64_t first_row) {
  check_dim("y", y, 2);
  check_shape("term", term_in, y.sizes());
  check_one_element("seed", seed, ScalarType::Long);
  check_probability("dropout_p", p);
  const Tensor term = as_contiguous(term_in);
  STD_TORCH_CHECK(y.stride(1) == 1 || y.size(1) <= 1, "y: expected contiguous rows, got stride ", y.stride(1));
  const int64_t rows = y.size(0), size = y.size(1), y_stride = y.stride(0);
  const Mask mask(*seed.const_data_ptr<int64_t>(), p);
  dispatch_floating("y", y, "term", term.scalar_type(), [&]<typename T, typename W>() {
    const W* from = term.const_data_ptr<W>();
    T* to = y.mutable_data_ptr<T>();
    for_each_row(rows, size, [=](int64_t row) {
      const W* term_row = from + row * size;
      T* y_row = to + row * y_stride;
      mask.for_each(first_row + row, size, [=](int64_t i, IntVec keep) {
        const Vec added = kept(load_upto(term_row + i, size - i) * mask.scale, keep);
        store_upto(y_row + i, load_upto(static_cast<const T*>(y_row) + i, size - i) + added, size - i);
      });
    });
  });
}

MEMKERNELS_CPU_KERNEL(row_dropout);
MEMKERNELS_CPU_KERNEL(row_dropout_add_);

}  // namespace
}  // namespace memkernels::cpu
