// Layer norm over the last dimension, with an optional residual added in the same pass:
//   h = x + residual    n = (h - mean) * rstd    y = n * weight + bias    rstd = (mean((h - mean)^2) + eps)^(-1/2)
//   dh = rstd * (g - mean(g) - n * mean(g * n)) + dresidual_out    with g = dy * weight
//   dweight = sum over rows of dy * n        dbias = sum over rows of dy
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
// So few rows that they are still in cache, so many that the sums are seldom read and written.
constexpr int64_t kRowsPerGroup = 4;

struct Moments {
  float mean, variance;
};

// The corrected two-pass algorithm (Chan, Golub and LeVeque 1983): a large mean costs no digits of the variance.
template <typename T>
Moments moments(const T* h, int64_t size) {
  const float count = static_cast<float>(size);
  const auto [total] = sum_each_vec<1>(size, [&](auto at, auto, Vec* sums) { sums[0] += at(h); });
  const float mean = total / count;
  const auto [deviation, squares] = sum_each_vec<2>(size, [&](auto at, auto, Vec* sums) {
    const Vec v = at(h, mean) - mean;
    sums[0] += v;
    sums[1] += v * v;
  });
  const float correction = deviation / count;
  return {mean + correction, squares / count - correction * correction};
}

template <typename T, typename W>
void forward_row(const T* h, const W* weight, const W* bias, float mean, float scale, T* y, int64_t size) {
  if (bias == nullptr) {
    for_each_vec(size, [&](auto at, auto to) { to(y, (at(h) - mean) * scale * at(weight)); });
  } else {
    for_each_vec(size, [&](auto at, auto to) { to(y, (at(h) - mean) * scale * at(weight) + at(bias)); });
  }
}

template <typename T, typename W>
void forward(const T* x, const T* residual, const W* weight, const W* bias, T* y, T* residual_out, float* means,
             float* rstd, int64_t rows, int64_t size, float eps) {
  torch::stable::parallel_for(0, rows, kRowsPerTask, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* h = residual_row(x, residual, residual_out, row * size, size);
      const auto [mean, variance] = moments(h, size);
      const float scale = 1.0f / std::sqrt(variance + eps);
      means[row] = mean;
      rstd[row] = scale;
      forward_row(h, weight, bias, mean, scale, y + row * size, size);
    }
  });
}

// One row's dh.
template <typename T, typename W>
void backward_row(const T* dy, const T* dresidual_out, const T* h, const W* weight, float mean, float scale, T* dx,
                  int64_t size) {
  // In lanes beyond the row's end dy is 0, and with it each term.
  const auto [grads, products] = sum_each_vec<2>(size, [&](auto at, auto, Vec* sums) {
    const Vec weighted = at(dy) * at(weight);
    sums[0] += weighted;
    sums[1] += weighted * ((at(h) - mean) * scale);
  });
  const float grad_mean = grads / static_cast<float>(size);
  const float shrink = scale * products / static_cast<float>(size);
  for_each_vec(size, [&](auto at, auto to) {
    Vec grad = scale * (at(dy) * at(weight) - grad_mean - (at(h) - mean) * shrink);
    if (dresidual_out != nullptr) grad += at(dresidual_out);
    to(dx, grad);
  });
}

// Adds what `rows` rows give to the sums of dweight and dbias.
template <typename T>
void add_parameter_grads(const T* dy, const T* h, const float* means, const float* rstd, float* dweight, float* dbias,
                         int64_t rows, int64_t size) {
  for_each_vec(size, [&](auto at, auto to) {
    Vec weight_sum = at(static_cast<const float*>(dweight)), bias_sum = at(static_cast<const float*>(dbias));
    for (int64_t row = 0; row < rows; ++row) {
      const Vec grad = at(dy + row * size);
      weight_sum += grad * ((at(h + row * size) - means[row]) * rstd[row]);
      bias_sum += grad;
    }
    to(dweight, weight_sum);
    to(dbias, bias_sum);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x_in, const std::optional<Tensor>& residual_in,
                                                          const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                                                          double eps) {
  const int64_t size = last_size("x", x_in), rows = row_count(x_in);
  check_tensor("residual", residual_in, x_in.scalar_type(), x_in.sizes());
  check_shape("weight", weight_in, {size});
  check_tensor("bias", bias_in, weight_in.scalar_type(), {size});
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const std::optional<Tensor> residual = as_contiguous(residual_in), bias = as_contiguous(bias_in);
  Tensor y = output_like(x);
  Tensor residual_out = residual.has_value() ? output_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, {rows}, ScalarType::Float), rstd = empty_like(mean);
  dispatch_floating("x", x, "weight", weight.scalar_type(), [&]<typename T, typename W>() {
    forward(x.const_data_ptr<T>(), data_or_null<T>(residual), weight.const_data_ptr<W>(), data_or_null<W>(bias),
            y.mutable_data_ptr<T>(), residual_out.mutable_data_ptr<T>(), mean.mutable_data_ptr<float>(),
            rstd.mutable_data_ptr<float>(), rows, size, static_cast<float>(eps));
  });
  return {y, residual_out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy_in, const std::optional<Tensor>& dresidual_out_in,
                                                  const Tensor& h_in, const Tensor& weight_in, const Tensor& mean_in,
                                                  const Tensor& rstd_in, bool weight_grad, bool bias_grad) {
  const int64_t size = last_size("h", h_in), rows = row_count(h_in);
  check_tensor("dy", dy_in, h_in.scalar_type(), h_in.sizes());
  check_tensor("dresidual_out", dresidual_out_in, h_in.scalar_type(), h_in.sizes());
  check_shape("weight", weight_in, {size});
  check_tensor("mean", mean_in, ScalarType::Float, {rows});
  check_tensor("rstd", rstd_in, ScalarType::Float, {rows});
  const Tensor dy = as_contiguous(dy_in), h = as_contiguous(h_in), weight = as_contiguous(weight_in);
  const Tensor mean = as_contiguous(mean_in), rstd = as_contiguous(rstd_in);
  const std::optional<Tensor> dresidual_out = as_contiguous(dresidual_out_in);
  const bool parameter_grads = weight_grad || bias_grad;
  Tensor dx = output_like(h);
  Tensor dweight = weight_grad ? empty_like(weight) : torch::stable::new_empty(weight, {0});
  Tensor dbias = bias_grad ? empty_like(weight) : torch::stable::new_empty(weight, {0});
  RowSums sums(rows, parameter_grads ? 2 * size : 0);
  dispatch_floating("h", h, "weight", weight.scalar_type(), [&]<typename T, typename W>() {
    const auto *dy_data = dy.const_data_ptr<T>(), *h_data = h.const_data_ptr<T>();
    const T* residual_data = data_or_null<T>(dresidual_out);
    const W* weight_data = weight.const_data_ptr<W>();
    const auto *means = mean.const_data_ptr<float>(), *scales = rstd.const_data_ptr<float>();
    T* dx_data = dx.mutable_data_ptr<T>();
    sums.for_each_block([&](int64_t begin, int64_t end, float* block) {
      for (int64_t group = begin; group < end; group += kRowsPerGroup) {
        const int64_t count = std::min(kRowsPerGroup, end - group);
        for (int64_t row = group; row < group + count; ++row) {
          const int64_t first = row * size;
          backward_row(dy_data + first, residual_data == nullptr ? nullptr : residual_data + first, h_data + first,
                       weight_data, means[row], scales[row], dx_data + first, size);
        }
        if (!parameter_grads) continue;
        const int64_t first = group * size;
        add_parameter_grads(dy_data + first, h_data + first, means + group, scales + group, block, block + size, count,
                            size);
      }
    });
    if (weight_grad) sums.write(dweight.mutable_data_ptr<W>(), 0, size);
    if (bias_grad) sums.write(dbias.mutable_data_ptr<W>(), size, size);
  });
  return {dx, dweight, dbias};
}

MEMKERNELS_CPU_KERNEL(layer_norm_fwd);
MEMKERNELS_CPU_KERNEL(layer_norm_bwd);

}  // namespace
}  // namespace memkernels::cpu
