// One step of an optimizer over all parameters of a group: one launch for each 32 of them that are stored alike.
//
// Parameters are cut into chunks, of which a block of threads takes one; a table in the kernel's arguments says which
// chunks are whose, so that nothing is copied to the device first. A chunk is runs of 256 elements, each worked on by a
// warp: every tensor is read and written once, and no warp waits for another.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../common/cuda_launch.cuh"
#include "optimizer_storage.cuh"

namespace memkernels::cuda {

constexpr int kSlots = 32;  // a power of two
constexpr int64_t kChunkElements = 4096;
// Of a multiprocessor at a time: that leaves 96 registers a thread, for eight elements of four tensors.
constexpr int kOptimizerBlocks = 5;

// Parameters that are stored alike, and what a step of each takes. Chunks are counted over all of them.
template <typename Update>
struct SlotTable {
  Slot slots[kSlots];
  Update updates[kSlots];
  int64_t first_chunk[kSlots];  // beyond the last parameter above any chunk
  uint64_t seed;
  const float* grad_factor;
  const float* lr_factor;
  float grad_scale;
};

// A warp's step of a run. `moments` are theirs, in order; load_values(grad, run, values) gives the gradient.
template <typename Update, typename Gradient, typename Parameter, typename... Moments>
__device__ __forceinline__ void update_run(const Update& update, const Run& run, float grad_scale, const Gradient& grad,
                                           const Parameter& parameter, const Moments&... moments) {
  Values p, g, m[sizeof...(Moments) + 1];
  load_values(grad, run, g);
  parameter.load(run, p);
  const auto each = [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (moments.load(run, m[kIndex]), ...);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        update.template apply<OneLane>(p.value[quad][i], g.value[quad][i] * grad_scale, m[kIndex].value[quad][i]...);
      }
    }
    parameter.store(run, p);
    (moments.store(run, m[kIndex]), ...);
  };
  each(std::make_integer_sequence<int, sizeof...(Moments)>());
}

// A block's step of a chunk.
template <typename Update, typename Grad, typename Parameter, typename... Moments>
__device__ __forceinline__ void update_chunk(const Update& update, int64_t first, int64_t size, float grad_scale,
                                             const Grad* grad, const Parameter& parameter, const Moments&... moments) {
  const bool aligned =
      is_aligned(grad, kQuad * sizeof(Grad)) && parameter.is_aligned() && (moments.is_aligned() && ...);
  const int64_t end = size - first < kChunkElements ? size : first + kChunkElements;
#pragma unroll 1
  for (first += threadIdx.x / 32 * kRun; first < end; first += kOptimizerWarps * kRun) {
    const int count = end - first < kRun ? static_cast<int>(end - first) : static_cast<int>(kRun);
    update_run(update, {first, count, aligned && count == kRun}, grad_scale, grad, parameter, moments...);
  }
}

template <typename Parameter, typename Update, typename... Moments>
__global__ void __launch_bounds__(kOptimizerThreads, kOptimizerBlocks)
    optimizer_kernel(const __grid_constant__ SlotTable<Update> table) {
  (Moments::prepare(), ...);
  __syncthreads();
  const float grad_scale = table.grad_scale * (table.grad_factor == nullptr ? 1.0f : *table.grad_factor);
  const int64_t chunk = blockIdx.x;
  const int at = owner_of(table.first_chunk, chunk);
  const Slot& slot = table.slots[at];
  const int64_t first = (chunk - table.first_chunk[at]) * kChunkElements;
  Update update = table.updates[at];
  if (table.lr_factor != nullptr) update = update.scaled(*table.lr_factor);
  const auto each = [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    update_chunk(update, first, slot.size, grad_scale, static_cast<const typename Parameter::Stored*>(slot.grad),
                 parameter_of<Parameter>(slot, table.seed), moment_of<Moments>(slot, table.seed, kIndex)...);
  };
  each(std::make_integer_sequence<int, sizeof...(Moments)>());
}

// A step of slots that are stored alike.
template <typename Parameter, typename... Moments, typename Rule>
void launch_slots(const std::vector<const Slot*>& slots, const Group& group, const Rule& rule, cudaStream_t stream) {
  using Table = SlotTable<decltype(rule.at(1))>;
  static_assert(sizeof(Table) <= kKernelArguments);
  for (size_t first = 0; first < slots.size(); first += kSlots) {
    Table table{};
    table.seed = group.seed;
    table.grad_factor = group.grad_factor;
    table.lr_factor = group.lr_factor;
    table.grad_scale = group.grad_scale;
    int64_t chunks = 0;
    for (size_t i = 0; i < kSlots; ++i) {
      if (first + i >= slots.size()) {
        table.first_chunk[i] = std::numeric_limits<int64_t>::max();
        continue;
      }
      const Slot& slot = *slots[first + i];
      table.slots[i] = slot;
      table.updates[i] = rule.at(slot.step);
      table.first_chunk[i] = chunks;
      chunks += (slot.size + kChunkElements - 1) / kChunkElements;
    }
    launch(optimizer_kernel<Parameter, decltype(rule.at(1)), Moments...>, chunks, kOptimizerThreads, stream, table);
  }
}

// A step of every parameter of a group by rule.at(step), an update; a moment for each of kSigned.
template <bool... kSigned, typename Rule>
void launch_optimizer_step(const Group& group, const Rule& rule, cudaStream_t stream) {
  std::vector<const Slot*> plain, rounded, split;
  for (const Slot& slot : group.slots) {
    if (slot.size > 0) (!slot.bfloat16 ? plain : slot.remainder == nullptr ? rounded : split).push_back(&slot);
  }
  const auto stored = [&]<int kBits>(std::integral_constant<int, kBits>) {
    launch_slots<PlainFloat, Moment<kBits, kSigned>...>(plain, group, rule, stream);
    launch_slots<StochasticBFloat16, Moment<kBits, kSigned>...>(rounded, group, rule, stream);
    launch_slots<SplitFloat, Moment<kBits, kSigned>...>(split, group, rule, stream);
  };
  with_state_bits(sizeof...(kSigned) == 0 ? 32 : group.state_bits, stored);
}

}  // namespace memkernels::cuda
