// Noise over the rows of a matrix that is made anew from the seed wherever it is needed: out = u * x in float32, with
//   u = 1 - width + 2^-23 width w
// uniform in [1 - width, 1 + width], w the upper 24 bits of an element's word.
#include <cmath>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/outputs.h"
#include "cpu/row_words.h"

namespace memkernels::cpu {
namespace {

Tensor row_noise(const Tensor& x_in, const Tensor& seed, double width, int64_t first_row) {
  check_dim("x", x_in, 2);
  check_one_element("seed", seed, ScalarType::Long);
  const Tensor x = as_contiguous(x_in);
  Tensor out = new_output(x, x.sizes(), ScalarType::Float);
  const int64_t rows = x.size(0), size = x.size(1);
  const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const auto step = static_cast<float>(std::ldexp(width, -23)), least = static_cast<float>(1.0 - width);
  float* to = out.mutable_data_ptr<float>();
  dispatch_floating("x", x, [&]<typename T>() {
    const T* from = x.const_data_ptr<T>();
    for_each_row(rows, size, [=](int64_t row) {
      const T* x_row = from + row * size;
      float* out_row = to + row * size;
      for_each_word(key, first_row + row, size, [=](int64_t i, UIntVec word) {
        const Vec u = __builtin_convertvector(bits_as<IntVec>(word >> 8), Vec) * step + least;
        store_upto(out_row + i, load_upto(x_row + i, size - i) * u, size - i);
      });
    });
  });
  return out;
}

MEMKERNELS_CPU_KERNEL(row_noise);

}  // namespace
}  // namespace memkernels::cpu
