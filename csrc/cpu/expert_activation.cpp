// The activation between an expert's two products, with the router's weight w of each row in it:
//   h = w * act(gate) * up                      gate_up is [rows, 2 n], gate beside up; ungated, act of [rows, n]
//   dgate = w * dh * up * act'(gate)            dup = w * dh * act(gate)            dw = <dh, act(gate) * up>
#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/activations.h"
#include "cpu/outputs.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kElementsPerTask = 16384;

int64_t rows_per_task(int64_t size) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, size));
}

template <typename Act, typename T>
void forward_row(const T* gate, const T* up, float weight, T* h, int64_t size) {
  for_each_vec(size, [=](auto at, auto to) {
    Vec value = Act::at(at(gate)).value;
    if (up != nullptr) value *= at(up);
    to(h, value * weight);
  });
}

// dw. Outputs may be the inputs of the same element: dh of h, gate of dgate, up of dup.
template <typename Act, typename T>
float backward_row(const T* dh, const T* gate, const T* up, float weight, T* h, T* dgate, T* dup, int64_t size) {
  return sum_each_vec<1>(size, [=](auto at, auto to, Vec* sums) {
    const Activated a = Act::at(at(gate));
    const Vec grad = at(dh);
    const Vec weighted = grad * weight;
    Vec value = a.value, slope = a.derivative;
    if (up != nullptr) {
      const Vec factor = at(up);
      to(dup, weighted * value);
      value *= factor;
      slope *= factor;
    }
    to(dgate, weighted * slope);
    to(h, value * weight);
    sums[0] += grad * value;
  })[0];
}

template <typename Act, typename T>
void backward(const T* dh, const T* gate_up, const float* weights, T* h, T* dgate_up, float* dweights, int64_t rows,
              int64_t size, bool gated) {
  const int64_t width = gated ? 2 * size : size;
  torch::stable::parallel_for(0, rows, rows_per_task(size), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = gate_up + row * width;
      T* dgate = dgate_up + row * width;
      const int64_t first = row * size;
      dweights[row] = backward_row<Act>(dh + first, gate, gated ? gate + size : nullptr, weights[row], h + first, dgate,
                                        gated ? dgate + size : nullptr, size);
    }
  });
}

void check_rows(const Tensor& gate_up, const Tensor& row_weight, bool gated) {
  check_dim("gate_up", gate_up, 2);
  STD_TORCH_CHECK(!gated || gate_up.size(1) % 2 == 0, "gate_up: expected an even number of columns, got ",
                  gate_up.size(1));
  check_tensor("row_weight", row_weight, ScalarType::Float, {gate_up.size(0)});
}

void check_backward(const Tensor& dh, const Tensor& gate_up, const Tensor& row_weight, bool gated) {
  check_rows(gate_up, row_weight, gated);
  check_tensor("dh", dh, gate_up.scalar_type(), {gate_up.size(0), gated ? gate_up.size(1) / 2 : gate_up.size(1)});
}

Tensor expert_activation_fwd(const Tensor& gate_up_in, const Tensor& row_weight_in, bool gated,
                             const std::string& activation) {
  check_rows(gate_up_in, row_weight_in, gated);
  const Tensor gate_up = as_contiguous(gate_up_in), row_weight = as_contiguous(row_weight_in);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1), size = gated ? width / 2 : width;
  Tensor h = new_output(gate_up, {rows, size});
  dispatch_activation("gate_up", gate_up, activation, [&]<typename T, typename Act>() {
    const T* from = gate_up.const_data_ptr<T>();
    const float* weights = row_weight.const_data_ptr<float>();
    T* to = h.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, rows_per_task(size), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = from + row * width;
        forward_row<Act>(gate, gated ? gate + size : nullptr, weights[row], to + row * size, size);
      }
    });
  });
  return h;
}

// dh becomes h.
std::tuple<Tensor, Tensor> expert_activation_bwd(const Tensor& dh, const Tensor& gate_up_in,
                                                 const Tensor& row_weight_in, bool gated,
                                                 const std::string& activation) {
  check_backward(dh, gate_up_in, row_weight_in, gated);
  STD_TORCH_CHECK(dh.is_contiguous(), "dh: expected a contiguous tensor, since it is written in place");
  const Tensor gate_up = as_contiguous(gate_up_in), row_weight = as_contiguous(row_weight_in);
  Tensor dgate_up = output_like(gate_up);
  Tensor drow_weight = torch::stable::empty_like(row_weight);
  dispatch_activation("gate_up", gate_up, activation, [&]<typename T, typename Act>() {
    T* dh_data = dh.mutable_data_ptr<T>();
    backward<Act, T>(dh_data, gate_up.const_data_ptr<T>(), row_weight.const_data_ptr<float>(), dh_data,
                     dgate_up.mutable_data_ptr<T>(), drow_weight.mutable_data_ptr<float>(), dh.size(0), dh.size(1),
                     gated);
  });
  return {dgate_up, drow_weight};
}

// And gate_up its gradient.
Tensor expert_activation_bwd_(const Tensor& dh, const Tensor& gate_up, const Tensor& row_weight_in, bool gated,
                              const std::string& activation) {
  check_backward(dh, gate_up, row_weight_in, gated);
  STD_TORCH_CHECK(dh.is_contiguous() && gate_up.is_contiguous(),
                  "dh, gate_up: expected contiguous tensors, since they are written in place");
  const Tensor row_weight = as_contiguous(row_weight_in);
  Tensor drow_weight = torch::stable::empty_like(row_weight);
  dispatch_activation("gate_up", gate_up, activation, [&]<typename T, typename Act>() {
    T *dh_data = dh.mutable_data_ptr<T>(), *gates = gate_up.mutable_data_ptr<T>();
    backward<Act, T>(dh_data, gates, row_weight.const_data_ptr<float>(), dh_data, gates,
                     drow_weight.mutable_data_ptr<float>(), dh.size(0), dh.size(1), gated);
  });
  return drow_weight;
}

MEMKERNELS_CPU_KERNEL(expert_activation_fwd);
MEMKERNELS_CPU_KERNEL(expert_activation_bwd);
MEMKERNELS_CPU_KERNEL(expert_activation_bwd_);

}  // namespace
}  // namespace memkernels::cpu
