// Adafactor's operators on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/adafactor_tensors.h"
#include "../common/cuda_tensors.h"
#include "../common/optimizer_group.h"
#include "adafactor.cuh"

namespace memkernels::cuda {
namespace {

// Calls body(data) with the float or, as bits, the bfloat16 of a gradient.
template <typename Body>
void dispatch_grad(const Tensor& grad, const Body& body) {
  if (grad.scalar_type() == ScalarType::Float) return body(grad.const_data_ptr<float>());
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::BFloat16, "grad: expected float32 or bfloat16, got dtype ",
                  toString(grad.scalar_type()));
  body(static_cast<const uint16_t*>(grad.const_data_ptr()));
}

std::tuple<Tensor, Tensor> factored_squares(Tensor grad, double grad_scale, std::optional<Tensor> grad_factor) {
  const Matrices of = make_matrices(grad);
  const float* factor = make_grad_factor(grad_factor, grad);
  grad = as_contiguous(grad);
  const auto sums = [&](int64_t parts, int64_t rows, int64_t width) {
    return torch::stable::new_empty(grad, {parts * of.count, rows, width}, ScalarType::Float);
  };
  Tensor rows = sums(1, of.rows, 1), columns = sums(1, 1, of.width);
  dispatch_grad(grad, [&]<typename T>(const T* data) {
    if (grad.numel() == 0) {
      torch::stable::zero_(rows);
      torch::stable::zero_(columns);
      return;
    }
    const StreamOf stream(grad);
    const SquareTiles<T> tiles(data, of, static_cast<float>(grad_scale), factor);
    const auto in_parts = [&](int64_t parts) { return parts > 1 && !are_small(tiles); };
    Tensor row_parts = in_parts(tiles.row_parts) ? sums(tiles.row_parts, of.rows, 1) : rows;
    Tensor column_parts = in_parts(tiles.column_parts) ? sums(tiles.column_parts, 1, of.width) : columns;
    launch_factored_squares(tiles, row_parts.mutable_data_ptr<float>(), column_parts.mutable_data_ptr<float>(), stream);
    const auto add = [&](const Tensor& from, int64_t parts, Tensor& to) {
      if (!in_parts(parts)) return;
      launch_part_sums(from.const_data_ptr<float>(), parts, to.numel(), to.mutable_data_ptr<float>(), stream);
    };
    add(row_parts, tiles.row_parts, rows);
    add(column_parts, tiles.column_parts, columns);
  });
  return {rows, columns};
}

Tensor factored_square_sum(Tensor grad, Tensor rows, Tensor columns, double most, double grad_scale,
                           std::optional<Tensor> grad_factor) {
  const float* factor = make_grad_factor(grad_factor, grad);
  grad = as_contiguous(grad);
  const FactorRuns runs(make_factors(rows, columns, most, grad), grad.numel(), kSummedRuns);
  Tensor result = torch::stable::new_empty(grad, {}, ScalarType::Double);
  dispatch_grad(grad, [&]<typename T>(const T* data) {
    Tensor sums = torch::stable::new_empty(grad, {factor_blocks(runs)}, ScalarType::Double);
    const StreamOf stream(grad);
    launch_factored_square_sum(runs, data, static_cast<float>(grad_scale), factor, sums.mutable_data_ptr<double>(),
                               result.mutable_data_ptr<double>(), stream);
  });
  return result;
}

// Of one parameter.
void adafactor_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
                std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
                std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
                double grad_scale, std::optional<Tensor> grad_factor, std::optional<Tensor> lr_factor, double lr,
                double beta1, double weight_decay, Tensor rows, Tensor columns, double most) {
  STD_TORCH_CHECK(params.size() == 1, "params: expected one, got ", params.size());
  const bool has_moment = !moments.empty();
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 grad_scale, grad_factor, lr_factor, has_moment ? 1 : 0);
  const Factors factors = make_factors(rows, columns, most, params[0]);
  const StreamOf stream(params[0]);
  launch_adafactor(group, has_moment, Adafactor{lr, beta1, weight_decay}, factors, stream);
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("adafactor_", TORCH_BOX(&adafactor_));
  m.impl("factored_square_sum", TORCH_BOX(&factored_square_sum));
  m.impl("factored_squares", TORCH_BOX(&factored_squares));
}

}  // namespace
}  // namespace memkernels::cuda
