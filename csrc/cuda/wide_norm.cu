// The operators of RMS norm and layer norm over rows that a Triton program does not hold, on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/checks.h"
#include "../common/cuda_tensors.h"
#include "wide_norm.cuh"

namespace memkernels::cuda {
namespace {

int checked_size(const char* name, const Tensor& rows) {
  const int64_t size = last_size(name, rows);
  STD_TORCH_CHECK(size >= 1 && size <= kWidestNorm, name, ": expected rows of 1 to ", kWidestNorm, " elements, got ",
                  size);
  return static_cast<int>(size);
}

void check_teams(int64_t teams) {
  STD_TORCH_CHECK(teams >= 1 && teams <= INT32_MAX, "teams: expected 1 to 2^31 - 1, got ", teams);
}

template <typename T, typename W>
NormParameter<DeviceType<T>> parameter(const std::optional<Tensor>& values) {
  const W* data = data_or_null<W>(values);
  if constexpr (std::is_same_v<T, W>) {
    return {reinterpret_cast<const DeviceType<T>*>(data), nullptr};
  } else {
    return {nullptr, data};
  }
}

// What teams sum through.
Tensor zeroed_words(const Tensor& like, int64_t teams, int size) {
  return torch::stable::new_zeros(like, {team_words(teams, norm_blocks(size))}, ScalarType::Long);
}

template <typename T>
const DeviceType<T>* read(const std::optional<Tensor>& values) {
  return reinterpret_cast<const DeviceType<T>*>(data_or_null<T>(values));
}

template <typename T>
DeviceType<T>* written(Tensor& values) {
  return reinterpret_cast<DeviceType<T>*>(values.mutable_data_ptr<T>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wide_norm_fwd(Tensor x_in, std::optional<Tensor> residual_in,
                                                         Tensor weight_in, std::optional<Tensor> bias_in, double eps,
                                                         double weight_offset, bool centred, int64_t teams) {
  const int size = checked_size("x", x_in);
  check_tensor("residual", residual_in, x_in.scalar_type(), x_in.sizes());
  check_device("residual", residual_in, x_in);
  check_shape("weight", weight_in, {size});
  check_device("weight", weight_in, x_in);
  check_tensor("bias", bias_in, weight_in.scalar_type(), {size});
  check_device("bias", bias_in, x_in);
  STD_TORCH_CHECK(centred || !bias_in.has_value(), "bias: expected None where it is not centred");
  check_teams(teams);
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const std::optional<Tensor> residual = as_contiguous(residual_in), bias = as_contiguous(bias_in);
  const int64_t rows = row_count(x);
  Tensor y = torch::stable::empty_like(x);
  Tensor residual_out = residual.has_value() ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, {centred ? rows : 0}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor words = zeroed_words(x, teams, size);
  const StreamOf stream(x);
  dispatch_floating("x", x, "weight", weight.scalar_type(), [&]<typename T, typename W>() {
    const WideNormFwd<DeviceType<T>> of = {
        .x = read<T>(x),
        .residual = read<T>(residual),
        .weight = parameter<T, W>(weight),
        .bias = parameter<T, W>(bias),
        .y = written<T>(y),
        .residual_out = written<T>(residual_out),
        .mean = mean.mutable_data_ptr<float>(),
        .rstd = rstd.mutable_data_ptr<float>(),
        .words = reinterpret_cast<unsigned long long*>(words.mutable_data_ptr<int64_t>()),
        .rows = rows,
        .size = size,
        .eps = static_cast<float>(eps),
        .weight_offset = static_cast<float>(weight_offset),
    };
    launch_wide_norm_fwd(of, centred, rows == 0 ? 0 : teams, stream);
  });
  return {y, residual_out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> wide_norm_bwd(Tensor dy_in, std::optional<Tensor> dresidual_out_in, Tensor h_in,
                                                 Tensor weight_in, std::optional<Tensor> mean_in, Tensor rstd_in,
                                                 double weight_offset, bool weight_grad, bool bias_grad,
                                                 int64_t teams) {
  const int size = checked_size("h", h_in);
  const int64_t rows = row_count(h_in);
  check_tensor("dy", dy_in, h_in.scalar_type(), h_in.sizes());
  check_device("dy", dy_in, h_in);
  check_tensor("dresidual_out", dresidual_out_in, h_in.scalar_type(), h_in.sizes());
  check_device("dresidual_out", dresidual_out_in, h_in);
  check_shape("weight", weight_in, {size});
  check_device("weight", weight_in, h_in);
  check_tensor("mean", mean_in, ScalarType::Float, {rows});
  check_device("mean", mean_in, h_in);
  check_tensor("rstd", rstd_in, ScalarType::Float, {rows});
  check_device("rstd", rstd_in, h_in);
  const bool centred = mean_in.has_value();
  STD_TORCH_CHECK(centred || !bias_grad, "bias_grad: expected False without mean");
  check_teams(teams);
  const Tensor dy = as_contiguous(dy_in), h = as_contiguous(h_in), weight = as_contiguous(weight_in);
  const Tensor rstd = as_contiguous(rstd_in);
  const std::optional<Tensor> dresidual_out = as_contiguous(dresidual_out_in), mean = as_contiguous(mean_in);
  const auto sums = [&](bool wanted) {
    return torch::stable::new_empty(h, {wanted ? teams : 0, size}, ScalarType::Float);
  };
  Tensor dx = torch::stable::empty_like(h), dweight = sums(weight_grad), dbias = sums(bias_grad);
  Tensor words = zeroed_words(h, teams, size);
  const StreamOf stream(h);
  dispatch_floating("h", h, "weight", weight.scalar_type(), [&]<typename T, typename W>() {
    const WideNormBwd<DeviceType<T>> of = {
        .dy = read<T>(dy),
        .dresidual_out = read<T>(dresidual_out),
        .h = read<T>(h),
        .weight = parameter<T, W>(weight),
        .mean = data_or_null<float>(mean),
        .rstd = rstd.const_data_ptr<float>(),
        .dx = written<T>(dx),
        .dweight = weight_grad ? dweight.mutable_data_ptr<float>() : nullptr,
        .dbias = bias_grad ? dbias.mutable_data_ptr<float>() : nullptr,
        .words = reinterpret_cast<unsigned long long*>(words.mutable_data_ptr<int64_t>()),
        .rows = rows,
        .size = size,
        .weight_offset = static_cast<float>(weight_offset),
    };
    launch_wide_norm_bwd(of, centred, teams, stream);
  });
  return {dx, dweight, dbias};
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("wide_norm_bwd", TORCH_BOX(&wide_norm_bwd));
  m.impl("wide_norm_fwd", TORCH_BOX(&wide_norm_fwd));
}

}  // namespace
}  // namespace memkernels::cuda
