// h = act(gate) * up, element by element; h = act(gate) without up.
//   dgate = dh * up * act'(gate)        dup = dh * act(gate)
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/activations.h"
#include "cpu/outputs.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kElementsPerTask = 16384;

// Calls body(first, count) for parts of n elements; `first` keeps the alignment of an array's start.
template <typename Body>
void for_each_task(int64_t n, const Body& body) {
  torch::stable::parallel_for(0, (n + kElementsPerTask - 1) / kElementsPerTask, 1, [&](int64_t begin, int64_t end) {
    body(begin * kElementsPerTask, std::min(end * kElementsPerTask, n) - begin * kElementsPerTask);
    end_of_stream();
  });
}

template <typename T, typename Act, bool kStreamed>
void forward(const T* gate, const T* up, T* h, int64_t n) {
  for_each_task(n, [=](int64_t begin, int64_t count) {
    for_each_vec<kStreamed>(count, [=](auto at, auto to) {
      Vec value = Act::at(at(gate + begin)).value;
      if (up != nullptr) value *= at(up + begin);
      to(h + begin, value);
    });
  });
}

// Outputs may be the inputs of the same element. dup and h may be null, and up with them.
template <typename T, typename Act, bool kStreamed>
void backward(const T* dh, const T* gate, const T* up, T* dgate, T* dup, T* h, int64_t n) {
  for_each_task(n, [=](int64_t begin, int64_t count) {
    for_each_vec<kStreamed>(count, [=](auto at, auto to) {
      const Activated a = Act::at(at(gate + begin));
      const Vec grad = at(dh + begin);
      if (up == nullptr) {
        to(dgate + begin, grad * a.derivative);
        if (h != nullptr) to(h + begin, a.value);
        return;
      }
      const Vec factor = at(up + begin);
      to(dgate + begin, grad * factor * a.derivative);
      to(dup + begin, grad * a.value);
      if (h != nullptr) to(h + begin, a.value * factor);
    });
  });
}

Tensor gated_activation_fwd(const Tensor& gate_in, const std::optional<Tensor>& up_in, const std::string& activation) {
  check_tensor("up", up_in, gate_in.scalar_type(), gate_in.sizes());
  const Tensor gate = as_contiguous(gate_in);
  const std::optional<Tensor> up = as_contiguous(up_in);
  Tensor h = output_like(gate);
  dispatch_activation("gate", gate, activation, [&]<typename T, typename Act>() {
    const auto run = gate.numel() * sizeof(T) >= kStreamedBytes ? forward<T, Act, true> : forward<T, Act, false>;
    run(gate.const_data_ptr<T>(), data_or_null<T>(up), h.mutable_data_ptr<T>(), gate.numel());
  });
  return h;
}

std::tuple<Tensor, Tensor> gated_activation_bwd(const Tensor& dh_in, const Tensor& gate_in,
                                                const std::optional<Tensor>& up_in, const std::string& activation) {
  check_tensor("dh", dh_in, gate_in.scalar_type(), gate_in.sizes());
  check_tensor("up", up_in, gate_in.scalar_type(), gate_in.sizes());
  const Tensor dh = as_contiguous(dh_in), gate = as_contiguous(gate_in);
  const std::optional<Tensor> up = as_contiguous(up_in);
  Tensor dgate = output_like(gate);
  Tensor dup = up.has_value() ? output_like(gate) : torch::stable::new_empty(gate, {0});
  dispatch_activation("gate", gate, activation, [&]<typename T, typename Act>() {
    const auto run = gate.numel() * sizeof(T) >= kStreamedBytes ? backward<T, Act, true> : backward<T, Act, false>;
    run(dh.const_data_ptr<T>(), gate.const_data_ptr<T>(), data_or_null<T>(up), dgate.mutable_data_ptr<T>(),
        dup.mutable_data_ptr<T>(), nullptr, gate.numel());
  });
  return {dgate, dup};
}

void gated_activation_bwd_(const Tensor& dh, const Tensor& gate, const std::optional<Tensor>& up,
                           const std::string& activation) {
  check_tensor("dh", dh, gate.scalar_type(), gate.sizes());
  check_tensor("up", up, gate.scalar_type(), gate.sizes());
  STD_TORCH_CHECK(dh.is_contiguous() && gate.is_contiguous() && (!up.has_value() || up->is_contiguous()),
                  "dh, gate, up: expected contiguous tensors, since they are written in place");
  dispatch_activation("gate", gate, activation, [&]<typename T, typename Act>() {
    T* up_data = up.has_value() ? up->mutable_data_ptr<T>() : nullptr;
    T* gate_data = gate.mutable_data_ptr<T>();
    T* dh_data = dh.mutable_data_ptr<T>();
    backward<T, Act, false>(dh_data, gate_data, up_data, gate_data, up_data, dh_data, gate.numel());
  });
}

MEMKERNELS_CPU_KERNEL(gated_activation_fwd);
MEMKERNELS_CPU_KERNEL(gated_activation_bwd);
MEMKERNELS_CPU_KERNEL(gated_activation_bwd_);

}  // namespace
}  // namespace memkernels::cpu
