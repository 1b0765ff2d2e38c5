// The operators of the dispatch to experts on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/cuda_tensors.h"
#include "../common/moe_tensors.h"
#include "moe.cuh"

namespace memkernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_plan(Tensor expert_ids_in, int64_t num_experts, int64_t capacity) {
  const int64_t rows = check_moe_plan(expert_ids_in, num_experts, capacity);
  const Tensor expert_ids = as_contiguous(expert_ids_in);
  const int64_t pairs = expert_ids.numel();
  const auto new_int32 = [&](int64_t size) { return torch::stable::new_empty(expert_ids, {size}, ScalarType::Int); };
  Tensor row_of_pair = torch::stable::new_empty(expert_ids, expert_ids.sizes(), ScalarType::Int);
  Tensor pair_of_row = new_int32(rows), offsets = new_int32(num_experts + 1), counts = new_int32(num_experts + 1);
  Tensor before = new_int32(plan_blocks(pairs) * (num_experts + 1));
  const StreamOf stream(expert_ids);
  const auto run = [&](const auto* ids) {
    launch_moe_plan(ids, pairs, num_experts, capacity, rows, before.mutable_data_ptr<int32_t>(),
                    row_of_pair.mutable_data_ptr<int32_t>(), pair_of_row.mutable_data_ptr<int32_t>(),
                    offsets.mutable_data_ptr<int32_t>(), counts.mutable_data_ptr<int32_t>(), stream);
  };
  if (expert_ids.scalar_type() == ScalarType::Int) {
    run(expert_ids.const_data_ptr<int32_t>());
  } else {
    run(expert_ids.const_data_ptr<int64_t>());
  }
  return {row_of_pair, pair_of_row, offsets, counts};
}

// offsets is null where no grouped row is written.
MoeRows rows_of(const Tensor& row_of_pair, const std::optional<Tensor>& token_offsets, const Tensor* offsets,
                int64_t rows, int64_t size) {
  return {
      .row_of_pair = row_of_pair.const_data_ptr<int32_t>(),
      .end = offsets == nullptr ? nullptr : offsets->const_data_ptr<int32_t>() + offsets->numel() - 1,
      .tokens = token_count(row_of_pair, token_offsets),
      .choices = token_offsets.has_value() ? 0 : row_of_pair.size(1),
      .rows = rows,
      .packs = size,
      .token_offsets = data_or_null<int32_t>(token_offsets),
      .pairs = row_of_pair.numel(),
  };
}

Tensor moe_dispatch(Tensor x_in, std::optional<Tensor> weights_in, Tensor row_of_pair_in, Tensor offsets_in,
                    int64_t num_rows, std::optional<Tensor> token_offsets_in) {
  check_moe_dispatch(x_in, weights_in, row_of_pair_in, offsets_in, num_rows, token_offsets_in);
  check_device("weights", weights_in, x_in);
  check_device("row_of_pair", row_of_pair_in, x_in);
  check_device("offsets", offsets_in, x_in);
  check_device("token_offsets", token_offsets_in, x_in);
  const Tensor x = as_contiguous(x_in), row_of_pair = as_contiguous(row_of_pair_in);
  const Tensor offsets = as_contiguous(offsets_in);
  const std::optional<Tensor> weights = as_contiguous(weights_in), token_offsets = as_contiguous(token_offsets_in);
  Tensor grouped = torch::stable::new_empty(x, {num_rows, x.size(1)});
  const StreamOf stream(x);
  dispatch_floating("x", x, [&]<typename T>() {
    launch_moe_dispatch(rows_of(row_of_pair, token_offsets, &offsets, num_rows, x.size(1)),
                        reinterpret_cast<const DeviceType<T>*>(x.const_data_ptr<T>()), data_or_null<float>(weights),
                        reinterpret_cast<DeviceType<T>*>(grouped.mutable_data_ptr<T>()), stream);
  });
  return grouped;
}

Tensor moe_combine(Tensor y_grouped_in, std::optional<Tensor> weights_in, Tensor row_of_pair_in,
                   std::optional<Tensor> token_offsets_in) {
  check_moe_combine(y_grouped_in, weights_in, row_of_pair_in, token_offsets_in);
  check_device("weights", weights_in, y_grouped_in);
  check_device("row_of_pair", row_of_pair_in, y_grouped_in);
  check_device("token_offsets", token_offsets_in, y_grouped_in);
  const Tensor y_grouped = as_contiguous(y_grouped_in), row_of_pair = as_contiguous(row_of_pair_in);
  const std::optional<Tensor> weights = as_contiguous(weights_in), token_offsets = as_contiguous(token_offsets_in);
  const int64_t size = y_grouped.size(1);
  Tensor y = torch::stable::new_empty(y_grouped, {token_count(row_of_pair, token_offsets), size});
  const StreamOf stream(y_grouped);
  dispatch_floating("y_grouped", y_grouped, [&]<typename T>() {
    launch_moe_combine(rows_of(row_of_pair, token_offsets, nullptr, y_grouped.size(0), size),
                       reinterpret_cast<const DeviceType<T>*>(y_grouped.const_data_ptr<T>()),
                       data_or_null<float>(weights), reinterpret_cast<DeviceType<T>*>(y.mutable_data_ptr<T>()), stream);
  });
  return y;
}

std::tuple<Tensor, Tensor> moe_combine_bwd(Tensor dy_in, Tensor y_grouped_in, Tensor weights_in, Tensor row_of_pair_in,
                                           Tensor offsets_in, std::optional<Tensor> token_offsets_in) {
  check_moe_combine_bwd(dy_in, y_grouped_in, weights_in, row_of_pair_in, offsets_in, token_offsets_in);
  check_device("y_grouped", y_grouped_in, dy_in);
  check_device("weights", weights_in, dy_in);
  check_device("row_of_pair", row_of_pair_in, dy_in);
  check_device("offsets", offsets_in, dy_in);
  check_device("token_offsets", token_offsets_in, dy_in);
  const Tensor dy = as_contiguous(dy_in), y_grouped = as_contiguous(y_grouped_in), weights = as_contiguous(weights_in);
  const Tensor row_of_pair = as_contiguous(row_of_pair_in), offsets = as_contiguous(offsets_in);
  const std::optional<Tensor> token_offsets = as_contiguous(token_offsets_in);
  Tensor dy_grouped = torch::stable::empty_like(y_grouped);
  Tensor dweights = torch::stable::empty_like(weights);
  const StreamOf stream(dy);
  dispatch_floating("dy", dy, [&]<typename T>() {
    launch_moe_combine_bwd(
        rows_of(row_of_pair, token_offsets, &offsets, y_grouped.size(0), dy.size(1)),
        reinterpret_cast<const DeviceType<T>*>(dy.const_data_ptr<T>()),
        reinterpret_cast<const DeviceType<T>*>(y_grouped.const_data_ptr<T>()), weights.const_data_ptr<float>(),
        reinterpret_cast<DeviceType<T>*>(dy_grouped.mutable_data_ptr<T>()), dweights.mutable_data_ptr<float>(), stream);
  });
  return {dy_grouped, dweights};
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
  m.impl("moe_combine_bwd", TORCH_BOX(&moe_combine_bwd));
  m.impl("moe_dispatch", TORCH_BOX(&moe_dispatch));
  m.impl("moe_plan", TORCH_BOX(&moe_plan));
}

}  // namespace
}  // namespace memkernels::cuda
