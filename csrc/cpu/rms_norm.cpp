// RMS norm over the last dimension, with an optional residual added in the same pass:
//   h = x + residual        y = h * rstd * (weight + offset)        rstd = (mean(h^2) + eps)^(-1/2)
//   dh = rstd * (g - n * mean(g * n)) + dresidual_out    with g = dy * (weight + offset), n = h * rstd
//   dweight = sum over rows of dy * n
#include <cmath>
#include <tuple>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/outputs.h"
#include "cpu/residual.h"
#include "cpu/row_sums.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kRowsPerTask = 8;

template <typename T, typename W>
void forward(const T* x, const T* residual, const W* weight, T* y, T* residual_out, float* rstd, int64_t rows,
             int64_t size, float eps, float offset) {
  torch::stable::parallel_for(0, rows, kRowsPerTask, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* h = residual_row(x, residual, residual_out, row * size, size);
      const auto [squares] = sum_each_vec<1>(size, [&](auto at, auto, Vec* sums) {
        const Vec v = at(h);
        sums[0] += v * v;
      });
      const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
      rstd[row] = scale;
      T* out = y + row * size;
      for_each_vec(size, [&](auto at, auto to) { to(out, at(h) * scale * (at(weight) + offset)); });
    }
  });
}

// One row's dh, its part of dweight added to the sums where they are wanted.
template <bool weight_grad, typename T, typename W>
void backward_row(const T* dy, const T* dresidual_out, const T* h, const W* weight, float scale, T* dx, float* dweight,
                  int64_t size, float offset) {
  const auto [products] = sum_each_vec<1>(size, [&](auto at, auto to, Vec* sums) {
    const Vec partial = at(dy) * (at(h) * scale);
    sums[0] += partial * (at(weight) + offset);
    if constexpr (weight_grad) to(dweight, at(static_cast<const float*>(dweight)) + partial);
  });
  const float shrink = scale * products / static_cast<float>(size);
  for_each_vec(size, [&](auto at, auto to) {
    Vec grad = scale * (at(dy) * (at(weight) + offset) - at(h) * shrink);
    if (dresidual_out != nullptr) grad += at(dresidual_out);
    to(dx, grad);
  });
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(const Tensor& x_in, const std::optional<Tensor>& residual_in,
                                                const Tensor& weight_in, double eps, double weight_offset) {
  const int64_t size = last_size("x", x_in), rows = row_count(x_in);
  check_tensor("residual", residual_in, x_in.scalar_type(), x_in.sizes());
  check_shape("weight", weight_in, {size});
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const std::optional<Tensor> residual = as_contiguous(residual_in);
  Tensor y = output_like(x);
  Tensor residual_out = residual.has_value() ? output_like(x) : torch::stable::new_empty(x, {0});
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  dispatch_floating("x", x, "weight", weight.scalar_type(), [&]<typename T, typename W>() {
    forward(x.const_data_ptr<T>(), data_or_null<T>(residual), weight.const_data_ptr<W>(), y.mutable_data_ptr<T>(),
            residual_out.mutable_data_ptr<T>(), rstd.mutable_data_ptr<float>(), rows, size, static_cast<float>(eps),
            static_cast<float>(weight_offset));
  });
  return {y, residual_out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy_in, const std::optional<Tensor>& dresidual_out_in,
                                        const Tensor& h_in, const Tensor& weight_in, const Tensor& rstd_in,
                                        double weight_offset, bool weight_grad) {
  const int64_t size = last_size("h", h_in), rows = row_count(h_in);
  check_tensor("dy", dy_in, h_in.scalar_type(), h_in.sizes());
  check_tensor("dresidual_out", dresidual_out_in, h_in.scalar_type(), h_in.sizes());
  check_shape("weight", weight_in, {size});
  check_tensor("rstd", rstd_in, ScalarType::Float, {rows});
  const Tensor dy = as_contiguous(dy_in), h = as_contiguous(h_in), weight = as_contiguous(weight_in),
               rstd = as_contiguous(rstd_in);
  const std::optional<Tensor> dresidual_out = as_contiguous(dresidual_out_in);
  const float offset = static_cast<float>(weight_offset);
  Tensor dx = output_like(h);
  Tensor dweight = weight_grad ? empty_like(weight) : torch::stable::new_empty(weight, {0});
  RowSums sums(rows, weight_grad ? size : 0);
  dispatch_floating("h", h, "weight", weight.scalar_type(), [&]<typename T, typename W>() {
    const auto *dy_data = dy.const_data_ptr<T>(), *h_data = h.const_data_ptr<T>();
    const T* residual_data = data_or_null<T>(dresidual_out);
    const W* weight_data = weight.const_data_ptr<W>();
    const float* scales = rstd.const_data_ptr<float>();
    T* dx_data = dx.mutable_data_ptr<T>();
    sums.for_each_block([&](int64_t begin, int64_t end, float* dweight_block) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * size;
        const T* dresidual = residual_data == nullptr ? nullptr : residual_data + first;
        const auto one_row = weight_grad ? backward_row<true, T, W> : backward_row<false, T, W>;
        one_row(dy_data + first, dresidual, h_data + first, weight_data, scales[row], dx_data + first, dweight_block,
                size, offset);
      }
    });
    if (weight_grad) sums.write(dweight.mutable_data_ptr<W>(), 0, size);
  });
  return {dx, dweight};
}

MEMKERNELS_CPU_KERNEL(rms_norm_fwd);
MEMKERNELS_CPU_KERNEL(rms_norm_bwd);

}  // namespace
}  // namespace memkernels::cpu
