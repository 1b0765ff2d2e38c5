// RMS norm over the last dimension, with an optional residual added in the same pass:
//   h = x + residual        y = h * rstd * (weight + offset)        rstd = (mean(h^2) + eps)^(-1/2)
//   dh = rstd * (g - n * mean(g * n)) + dresidual_out    with g = dy * (weight + offset), n = h * rstd
//   dweight = sum over rows of dy * n
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/kernel_table.h"
#include "common/tensors.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kRowsPerTask = 8;
// dweight is summed in this many blocks of rows, so that the result does not depend on the number of threads.
constexpr int64_t kWeightBlocks = 16;

template <typename T, typename W>
void forward(const T* x, const T* residual, const W* weight, T* y, T* residual_out, float* rstd, int64_t rows,
             int64_t size, float eps, float offset) {
  torch::stable::parallel_for(0, rows, kRowsPerTask, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* h = x + row * size;
      Vec squares{};
      if (residual != nullptr) {
        const T* added = residual + row * size;
        T* out = residual_out + row * size;
        for_each_vec(size, [&](auto at, auto to) {
          to(out, at(h) + at(added));
          // What is normalised is what the caller gets: the sum in its own dtype.
          const Vec v = at(static_cast<const T*>(out));
          squares += v * v;
        });
        h = out;
      } else {
        for_each_vec(size, [&](auto at, auto) {
          const Vec v = at(h);
          squares += v * v;
        });
      }
      const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
      rstd[row] = scale;
      T* out = y + row * size;
      for_each_vec(size, [&](auto at, auto to) { to(out, at(h) * scale * (at(weight) + offset)); });
    }
  });
}

template <typename T, typename W>
void backward(const T* dy, const T* dresidual_out, const T* h, const W* weight, const float* rstd, T* dx,
              float* dweight_blocks, int64_t rows, int64_t size, float offset) {
  const int64_t rows_per_block = (rows + kWeightBlocks - 1) / kWeightBlocks;
  torch::stable::parallel_for(0, kWeightBlocks, 1, [=](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      float* dweight = dweight_blocks == nullptr ? nullptr : dweight_blocks + block * size;
      if (dweight != nullptr) std::fill_n(dweight, size, 0.0f);
      for (int64_t row = block * rows_per_block; row < std::min(rows, (block + 1) * rows_per_block); ++row) {
        const T* dy_row = dy + row * size;
        const T* h_row = h + row * size;
        const float scale = rstd[row];
        Vec products{};
        for_each_vec(size, [&](auto at, auto to) {
          const Vec grad = at(dy_row);
          const Vec normed = at(h_row) * scale;
          products += grad * (at(weight) + offset) * normed;
          if (dweight != nullptr) to(dweight, at(static_cast<const float*>(dweight)) + grad * normed);
        });
        const float mean = sum(products) / static_cast<float>(size);
        T* dx_row = dx + row * size;
        const T* dresidual = dresidual_out == nullptr ? nullptr : dresidual_out + row * size;
        for_each_vec(size, [&](auto at, auto to) {
          Vec grad = scale * (at(dy_row) * (at(weight) + offset) - at(h_row) * (scale * mean));
          if (dresidual != nullptr) grad += at(dresidual);
          to(dx_row, grad);
        });
      }
    }
  });
}

template <typename W>
void sum_blocks(const float* blocks, W* dweight, int64_t size) {
  for_each_vec(size, [&](auto at, auto to) {
    Vec total{};
    for (int64_t block = 0; block < kWeightBlocks; ++block) total += at(blocks + block * size);
    to(dweight, total);
  });
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(const Tensor& x_in, const std::optional<Tensor>& residual_in,
                                                const Tensor& weight_in, double eps, double weight_offset) {
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const std::optional<Tensor> residual = as_contiguous(residual_in);
  const int64_t size = x.size(-1), rows = row_count(x);
  Tensor y = empty_like(x);
  Tensor residual_out = residual.has_value() ? empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  dispatch_floating(x.scalar_type(), weight.scalar_type(), [&]<typename T, typename W>() {
    forward(x.const_data_ptr<T>(), data_or_null<T>(residual), weight.const_data_ptr<W>(), y.mutable_data_ptr<T>(),
            residual_out.mutable_data_ptr<T>(), rstd.mutable_data_ptr<float>(), rows, size, static_cast<float>(eps),
            static_cast<float>(weight_offset));
  });
  return {y, residual_out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy_in, const std::optional<Tensor>& dresidual_out_in,
                                        const Tensor& h_in, const Tensor& weight_in, const Tensor& rstd,
                                        double weight_offset, bool weight_grad) {
  const Tensor dy = as_contiguous(dy_in), h = as_contiguous(h_in), weight = as_contiguous(weight_in);
  const std::optional<Tensor> dresidual_out = as_contiguous(dresidual_out_in);
  const int64_t size = h.size(-1), rows = row_count(h);
  Tensor dx = empty_like(h);
  Tensor dweight = weight_grad ? empty_like(weight) : torch::stable::new_empty(weight, {0});
  std::vector<float> blocks(weight_grad ? kWeightBlocks * size : 0);
  dispatch_floating(h.scalar_type(), weight.scalar_type(), [&]<typename T, typename W>() {
    backward(dy.const_data_ptr<T>(), data_or_null<T>(dresidual_out), h.const_data_ptr<T>(), weight.const_data_ptr<W>(),
             rstd.const_data_ptr<float>(), dx.mutable_data_ptr<T>(), weight_grad ? blocks.data() : nullptr, rows, size,
             static_cast<float>(weight_offset));
    if (weight_grad) sum_blocks(blocks.data(), dweight.mutable_data_ptr<W>(), size);
  });
  return {dx, dweight};
}

MEMKERNELS_CPU_KERNEL(rms_norm_fwd);
MEMKERNELS_CPU_KERNEL(rms_norm_bwd);

}  // namespace
}  // namespace memkernels::cpu
