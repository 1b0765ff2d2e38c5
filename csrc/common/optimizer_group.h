// What the optimizers' operators receive, checked.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "dynamic_code.h"
#include "optimizer_slots.h"

namespace memkernels {

inline void check_array(const char* name, size_t i, const Tensor& t, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == size && t.is_contiguous(), name, "[", i, "]: expected ",
                  size, " contiguous elements of dtype ", toString(dtype), ", got ", t.numel(), " of ",
                  toString(t.scalar_type()));
}

// `moments` and `absmax` hold those of every parameter for the first moment, then for the second; absmax is empty where
// states have 16 bits or more. `remainders` is empty, or has an empty tensor where a parameter is rounded. `origins`
// are multiples of kRun where moments have fewer bits. `grad_factor` and `lr_factor` are one float32 each beside the
// parameters.
inline Group make_group(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                        const std::vector<Tensor>& moments, const std::vector<Tensor>& absmax,
                        const std::vector<Tensor>& remainders, const std::vector<int64_t>& steps,
                        const std::vector<int64_t>& indices, const std::vector<int64_t>& origins, int64_t seed,
                        int64_t state_bits, double grad_scale, const std::optional<Tensor>& grad_factor,
                        const std::optional<Tensor>& lr_factor, size_t moment_count) {
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
  for (const auto& [name, tensors] : {std::pair("params", &parameters), std::pair("grads", &grads),
                                      std::pair("moments", &moments), std::pair("absmax", &absmax)}) {
    for (const Tensor& tensor : *tensors) check_device(name, tensor, parameters[0]);
  }
  const ScalarType moment_dtype =
      coded ? ScalarType::Byte : (state_bits == 16 ? ScalarType::BFloat16 : ScalarType::Float);
  const int64_t block = state_bits == 8 ? kBlock8 : kBlock4;
  Group group{.state_bits = state_bits,
              .seed = static_cast<uint64_t>(seed),
              .grad_scale = static_cast<float>(grad_scale),
              .grad_factor = nullptr,
              .lr_factor = nullptr};
  const auto factor = [&](const char* name, const std::optional<Tensor>& tensor) -> const float* {
    if (!tensor.has_value()) return nullptr;
    check_one_element(name, *tensor, ScalarType::Float);
    if (count > 0) check_device(name, *tensor, parameters[0]);
    return tensor->const_data_ptr<float>();
  };
  group.grad_factor = factor("grad_factor", grad_factor);
  group.lr_factor = factor("lr_factor", lr_factor);
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
    const int64_t cut = coded && moment_count > 0 ? kRun : 1;
    STD_TORCH_CHECK(slot.origin >= 0 && slot.origin % cut == 0, "origins[", i, "]: expected a multiple of ", cut,
                    " from 0 on, got ", slot.origin);
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
      check_device("remainders", remainders[i], parameter);
      STD_TORCH_CHECK(slot.bfloat16, "remainders[", i, "]: a float32 parameter has none");
      slot.remainder = remainders[i].mutable_data_ptr<int16_t>();
    }
    group.slots.push_back(slot);
  }
  return group;
}

}  // namespace memkernels
