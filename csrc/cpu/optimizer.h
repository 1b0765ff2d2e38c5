// One step of an optimizer over all parameters of a group in one call: what the operators receive, checked; threads
// that share the elements of all parameters; the loop over runs of 256 elements.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "common/tensors.h"
#include "cpu/optimizer_storage.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kMaxMoments = 2;
constexpr int64_t kElementsPerTask = 32768;  // a multiple of kRun

struct Slot {
  void* parameter;
  const void* grad;
  void* moments[kMaxMoments];
  float* absmax[kMaxMoments];
  int16_t* remainder;
  int64_t size, origin;
  bool bfloat16;
  uint32_t index, step;
};

struct Group {
  std::vector<Slot> slots;
  int64_t state_bits;
  uint64_t seed;
};

inline void check_array(const char* name, size_t i, const Tensor& t, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == size && t.is_contiguous(), name, "[", i, "]: expected ",
                  size, " contiguous elements of dtype ", toString(dtype), ", got ", t.numel(), " of ",
                  toString(t.scalar_type()));
}

// `moments` and `absmax` hold those of every parameter for the first moment, then for the second; absmax is empty where
// states have 16 bits or more. `remainders` is empty, or has an empty tensor where a parameter is rounded. `origins`
// are multiples of kRun.
inline Group make_group(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                        const std::vector<Tensor>& moments, const std::vector<Tensor>& absmax,
                        const std::vector<Tensor>& remainders, const std::vector<int64_t>& steps,
                        const std::vector<int64_t>& indices, const std::vector<int64_t>& origins, int64_t seed,
                        int64_t state_bits, size_t moment_count) {
  const size_t count = parameters.size();
  const bool coded = state_bits < 16;
  STD_TORCH_CHECK(state_bits == 32 || state_bits == 16 || state_bits == 8 || state_bits == 4,
                  "state_bits: expected 32, 16, 8 or 4, got ", state_bits);
  const auto check_count = [count](const char* name, const auto& list, size_t expected) {
    STD_TORCH_CHECK(list.size() == expected, name, ": expected ", expected, " for ", count, " parameters, got ",
                    list.size());
  };
  check_count("grads", grads, count);
  check_count("moments", moments, count * moment_count);
  check_count("absmax", absmax, coded ? moments.size() : 0);
  if (!remainders.empty()) check_count("remainders", remainders, count);
  check_count("steps", steps, count);
  check_count("indices", indices, count);
  check_count("origins", origins, count);
  const ScalarType moment_dtype =
      coded ? ScalarType::Byte : (state_bits == 16 ? ScalarType::BFloat16 : ScalarType::Float);
  const int64_t block = state_bits == 8 ? kBlock8 : kBlock4;
  Group group{{}, state_bits, static_cast<uint64_t>(seed)};
  for (size_t i = 0; i < count; ++i) {
    const Tensor& parameter = parameters[i];
    const ScalarType dtype = parameter.scalar_type();
    const int64_t size = parameter.numel();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "params[", i,
                    "]: expected float32 or bfloat16, got dtype ", toString(dtype));
    check_array("params", i, parameter, dtype, size);
    check_array("grads", i, grads[i], dtype, size);
    Slot slot{.parameter = parameter.mutable_data_ptr(),
              .grad = grads[i].const_data_ptr(),
              .size = size,
              .origin = origins[i],
              .bfloat16 = dtype == ScalarType::BFloat16,
              .index = static_cast<uint32_t>(indices[i]),
              .step = static_cast<uint32_t>(steps[i])};
    STD_TORCH_CHECK(slot.origin >= 0 && slot.origin % kRun == 0, "origins[", i, "]: expected a multiple of ", kRun,
                    ", got ", slot.origin);
    for (size_t moment = 0; moment < moment_count; ++moment) {
      const size_t at = moment * count + i;
      check_array("moments", at, moments[at], moment_dtype, state_bits == 4 ? (size + 1) / 2 : size);
      slot.moments[moment] = moments[at].mutable_data_ptr();
      if (!coded) continue;
      check_array("absmax", at, absmax[at], ScalarType::Float, (size + block - 1) / block);
      slot.absmax[moment] = absmax[at].mutable_data_ptr<float>();
    }
    if (!remainders.empty() && remainders[i].numel() > 0) {
      check_array("remainders", i, remainders[i], ScalarType::Short, size);
      STD_TORCH_CHECK(slot.bfloat16, "remainders[", i, "]: a float32 parameter has none");
      slot.remainder = remainders[i].mutable_data_ptr<int16_t>();
    }
    group.slots.push_back(slot);
  }
  return group;
}

// Calls body(copies...) with the n < 256 elements of each storage in memory for a run, zeros beyond, and copies back.
template <typename T, typename Body, typename... Storage>
void padded(int64_t n, const T* grad, Body&& body, Storage... storage) {
  struct Copy {
    void* original;
    void* copy;
    int64_t bytes;
  };
  constexpr int64_t kMaxArrays = 2 * (kMaxMoments + 1), kArrayBytes = kRun * 4;
  alignas(64) char memory[(kMaxArrays + 1) * kArrayBytes] = {};
  Copy copies[kMaxArrays];
  int count = 0;
  const auto into_copy = [&](auto*& data, int64_t elements) {
    Copy& copy = copies[count];
    copy = {data, memory + count * kArrayBytes, elements * static_cast<int64_t>(sizeof(*data))};
    ++count;
    std::memcpy(copy.copy, copy.original, copy.bytes);
    data = static_cast<std::remove_reference_t<decltype(data)>>(copy.copy);
  };
  (storage.arrays(n, into_copy), ...);
  T* grad_copy = reinterpret_cast<T*>(memory + kMaxArrays * kArrayBytes);
  std::memcpy(grad_copy, grad, n * sizeof(T));
  body(grad_copy, storage...);
  for (int i = 0; i < count; ++i) std::memcpy(copies[i].original, copies[i].copy, copies[i].bytes);
}

// A run of `count` elements: update(parameter, grad, moments...) changes the vectors of each, the gradient scaled.
template <typename Update, typename T, typename Parameter, typename... Moments>
inline void update_run(const Update& update, int64_t first, int64_t count, float grad_scale, const T* grad,
                       Parameter parameter, Moments... moments) {
  parameter.begin(first, count);
  (moments.begin(first, count), ...);
  for (int64_t i = 0; i < kRun; i += kLanes) {
    Vec p = parameter.get(i);
    std::tuple values{moments.get(i)...};
    std::apply([&](auto&... m) { update(p, load(grad + i) * grad_scale, m...); }, values);
    parameter.put(i, p);
    std::apply([&](auto&... m) { (moments.put(i, m), ...); }, values);
  }
  (moments.end(), ...);
}

// Elements [first, last) of a parameter, `first` a multiple of 256.
template <typename Update, typename T, typename Parameter, typename... Moments>
void update_range(const Update& update, int64_t first, int64_t last, float grad_scale, const T* grad,
                  Parameter parameter, Moments... moments) {
  for (; first + kRun <= last; first += kRun) {
    update_run(update, first, kRun, grad_scale, grad + first, parameter.at(first), moments.at(first)...);
  }
  if (first == last) return;
  padded(
      last - first, grad + first,
      [&](const T* grad_run, auto... copies) {
        update_run(update, first, last - first, grad_scale, grad_run, copies...);
      },
      parameter.at(first), moments.at(first)...);
}

// Calls body(grad, parameter) with their types.
template <typename Body>
void with_parameter(const Group& group, const Slot& slot, Body&& body) {
  const RandomPlace place{group.seed, 0, slot.index, slot.step, slot.origin};
  if (!slot.bfloat16) {
    return body(static_cast<const float*>(slot.grad), PlainFloat{static_cast<float*>(slot.parameter)});
  }
  auto* data = static_cast<BFloat16*>(slot.parameter);
  const auto* grad = static_cast<const BFloat16*>(slot.grad);
  if (slot.remainder != nullptr) return body(grad, SplitFloat{data, slot.remainder});
  body(grad, StochasticBFloat16{data, place});
}

// The i-th moment. In 16 bits it moves by less than bfloat16 resolves, so it is rounded at random.
template <int kBits, bool kSigned>
auto moment(const Group& group, const Slot& slot, int i) {
  void* data = slot.moments[i];
  if constexpr (kBits == 32) return PlainFloat{static_cast<float*>(data)};
  if constexpr (kBits == 16) {
    const RandomPlace place{group.seed, static_cast<uint32_t>(1 + i), slot.index, slot.step, slot.origin};
    return StochasticBFloat16{static_cast<BFloat16*>(data), place};
  }
  if constexpr (kBits == 8) return Codes8<kSigned>{static_cast<uint8_t*>(data), slot.absmax[i]};
  if constexpr (kBits == 4) return Codes4<kSigned>{static_cast<uint8_t*>(data), slot.absmax[i]};
}

// Calls body(moments...), one for each of kSigned, which says whether it has signs.
template <bool... kSigned, typename Body>
void with_moments(const Group& group, const Slot& slot, Body&& body) {
  const auto stored = [&]<int kBits>() {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
      body(moment<kBits, kSigned>(group, slot, kIndex)...);
    }(std::make_integer_sequence<int, sizeof...(kSigned)>{});
  };
  switch (group.state_bits) {
    case 32:
      return stored.template operator()<32>();
    case 16:
      return stored.template operator()<16>();
    case 8:
      return stored.template operator()<8>();
    default:
      return stored.template operator()<4>();
  }
}

// Calls body(slot, first, last) for ranges of elements that together are all of the group's, in parallel.
template <typename Body>
void for_each_range(const Group& group, const Body& body) {
  std::vector<int64_t> first_task{0};
  for (const Slot& slot : group.slots) {
    first_task.push_back(first_task.back() + (slot.size + kElementsPerTask - 1) / kElementsPerTask);
  }
  torch::stable::parallel_for(0, first_task.back(), 1, [&](int64_t task, int64_t end) {
    while (task < end) {
      const auto next = std::upper_bound(first_task.begin(), first_task.end(), task);
      const Slot& slot = group.slots[next - first_task.begin() - 1];
      const int64_t origin = *(next - 1), stop = std::min(end, *next);
      body(slot, (task - origin) * kElementsPerTask, std::min(slot.size, (stop - origin) * kElementsPerTask));
      task = stop;
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
