// One step of an optimizer over all parameters of a group in one call: threads that share the elements of all
// parameters; the loop over runs of 256 elements.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "common/optimizer_group.h"
#include "cpu/optimizer_storage.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kElementsPerTask = 32768;  // a multiple of kRun

// Calls body(copies...) with the n < 256 elements of each storage from element `before` on of memory for a run, zeros
// beyond and before, and copies back.
template <typename T, typename Body, typename... Storage>
void padded(int64_t before, int64_t n, const T* grad, Body&& body, Storage... storage) {
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
    auto* copy = reinterpret_cast<std::remove_reference_t<decltype(data)>>(memory + count * kArrayBytes);
    copies[count] = {data, copy + before, elements * static_cast<int64_t>(sizeof(*data))};
    std::memcpy(copies[count].copy, data, copies[count].bytes);
    ++count;
    data = copy;
  };
  (storage.arrays(n, into_copy), ...);
  T* grad_copy = reinterpret_cast<T*>(memory + kMaxArrays * kArrayBytes);
  std::memcpy(grad_copy + before, grad, n * sizeof(T));
  body(grad_copy, storage...);
  for (int i = 0; i < count; ++i) std::memcpy(copies[i].original, copies[i].copy, copies[i].bytes);
}

// A run of `count` elements: update.apply(parameter, grad, moments...) changes the vectors of each, the gradient
// scaled.
template <typename Update, typename T, typename Parameter, typename... Moments>
inline void update_run(const Update& update, int64_t first, int64_t count, float grad_scale, const T* grad,
                       Parameter parameter, Moments... moments) {
  parameter.begin(first, count);
  (moments.begin(first, count), ...);
  for (int64_t i = 0; i < kRun; i += kLanes) {
    Vec p = parameter.get(i);
    std::tuple values{moments.get(i)...};
    std::apply([&](auto&... m) { update.template apply<VecLanes>(p, load(grad + i) * grad_scale, m...); }, values);
    parameter.put(i, p);
    std::apply([&](auto&... m) { (moments.put(i, m), ...); }, values);
  }
  (moments.end(), ...);
}

// A gradient as `update_range` takes it: at(first, count) are its elements from `first` on.
template <typename T>
struct PlainGradient {
  const T* data;

  const T* at(int64_t first, int64_t) const { return data + first; }
};

// Elements [first, last) of a parameter, of which element -before is a run's first.
template <typename Update, typename Gradient, typename Parameter, typename... Moments>
void update_range(const Update& update, int64_t before, int64_t first, int64_t last, float grad_scale,
                  Gradient gradient, Parameter parameter, Moments... moments) {
  const auto update_part = [&](int64_t within, int64_t n) {
    padded(
        within, n, gradient.at(first, n),
        [&](const auto* grad_run, auto... copies) {
          update_run(update, first - within, within + n, grad_scale, grad_run, copies...);
        },
        parameter.at(first), moments.at(first)...);
    first += n;
  };
  const int64_t within = (before + first) % kRun;
  if (within > 0) update_part(within, std::min(last - first, kRun - within));
  for (; first + kRun <= last; first += kRun) {
    update_run(update, first, kRun, grad_scale, gradient.at(first, kRun), parameter.at(first), moments.at(first)...);
  }
  if (first < last) update_part(0, last - first);
}

// Calls body(grad, parameter) with their types.
template <typename Body>
void with_parameter(const Group& group, const Slot& slot, Body&& body) {
  if (!slot.bfloat16) {
    return body(static_cast<const float*>(slot.grad), PlainFloat{static_cast<float*>(slot.parameter)});
  }
  auto* data = static_cast<BFloat16*>(slot.parameter);
  const auto* grad = static_cast<const BFloat16*>(slot.grad);
  if (slot.remainder != nullptr) return body(grad, SplitFloat{data, slot.remainder});
  body(grad, StochasticBFloat16{data, random_place(slot, group.seed, 0)});
}

// The i-th moment. In 16 bits it moves by less than bfloat16 resolves, so it is rounded at random.
template <int kBits, bool kSigned>
auto moment(const Group& group, const Slot& slot, int i) {
  void* data = slot.moments[i];
  if constexpr (kBits == 32) return PlainFloat{static_cast<float*>(data)};
  if constexpr (kBits == 16) {
    return StochasticBFloat16{static_cast<BFloat16*>(data), random_place(slot, group.seed, 1 + i)};
  }
  if constexpr (kBits == 8) return Codes8<kSigned>{static_cast<uint8_t*>(data), slot.absmax[i]};
  if constexpr (kBits == 4) return Codes4<kSigned>{static_cast<uint8_t*>(data), slot.absmax[i]};
}

// Calls body(moments...), one for each of kSigned, which says whether it has signs.
template <bool... kSigned, typename Body>
void with_moments(const Group& group, const Slot& slot, Body&& body) {
  with_state_bits(group.state_bits, [&]<int kBits>(std::integral_constant<int, kBits>) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
      body(moment<kBits, kSigned>(group, slot, kIndex)...);
    }(std::make_integer_sequence<int, sizeof...(kSigned)>{});
  });
}

// How many elements of a slot's first run are before the slot's.
inline int64_t before(const Slot& slot) {
  return slot.origin % kRun;
}

// Calls body(slot, first, last) for ranges of elements that together are all of the group's, in parallel; none but the
// last of a slot ends within a run.
template <typename Body>
void for_each_range(const Group& group, const Body& body) {
  std::vector<int64_t> first_task{0};
  for (const Slot& slot : group.slots) {
    first_task.push_back(first_task.back() + (before(slot) + slot.size + kElementsPerTask - 1) / kElementsPerTask);
  }
  torch::stable::parallel_for(0, first_task.back(), 1, [&](int64_t task, int64_t end) {
    while (task < end) {
      const auto next = std::upper_bound(first_task.begin(), first_task.end(), task);
      const Slot& slot = group.slots[next - first_task.begin() - 1];
      const int64_t stop = std::min(end, *next);
      const auto element_of = [&](int64_t of) {
        return std::clamp<int64_t>((of - *(next - 1)) * kElementsPerTask - before(slot), 0, slot.size);
      };
      body(slot, element_of(task), element_of(stop));
      task = stop;
    }
  });
}

// A step of every parameter of a group by rule.at(step), an update; a moment for each of kSigned. gradient_of(elements)
// is the gradient that counts.
template <bool... kSigned, typename Rule, typename GradientOf>
void step_group(const Group& group, const Rule& rule, const GradientOf& gradient_of) {
  const float grad_scale = group.grad_scale * (group.grad_factor == nullptr ? 1.0f : *group.grad_factor);
  for_each_range(group, [&](const Slot& slot, int64_t first, int64_t last) {
    auto update = rule.at(slot.step);
    if (group.lr_factor != nullptr) update = update.scaled(*group.lr_factor);
    with_parameter(group, slot, [&](const auto* grad, auto parameter) {
      with_moments<kSigned...>(group, slot, [&](auto... moments) {
        update_range(update, before(slot), first, last, grad_scale, gradient_of(grad), parameter, moments...);
      });
    });
  });
}

template <bool... kSigned, typename Rule>
void step_group(const Group& group, const Rule& rule) {
  step_group<kSigned...>(group, rule, []<typename T>(const T* grad) { return PlainGradient<T>{grad}; });
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
