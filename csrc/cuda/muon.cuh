// Muon's momentum, and the direction that is made orthogonal: SGD's step (common/sgd.h) from zeros against its
// direction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/sgd.h"
#include "optimizer.cuh"

namespace memkernels::cuda {

// What is only written, rounded to nearest, by a step along gradients of type Grad.
template <typename Grad>
struct Direction {
  using Stored = Grad;
  __nv_bfloat16* data;

  __device__ __forceinline__ bool is_aligned() const { return cuda::is_aligned(data, kQuad * sizeof(*data)); }
  __device__ __forceinline__ void load(const Run&, Values& values) const { values = {}; }
  __device__ __forceinline__ void store(const Run& run, const Values& values) const {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      __nv_bfloat16 stored[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) stored[i] = __float2bfloat16_rn(values.value[quad][i]);
      store_group(data + run.first, first_of(quad), run.count, run.whole, stored);
    }
  }
};

// Of a group of one slot, whose parameter is the direction; its gradient and moment count.
template <typename Grad>
void launch_muon_momentum(const Group& group, double momentum, bool nesterov, cudaStream_t stream) {
  if (group.slots[0].size == 0) return;
  const SGD rule{.lr = -1, .momentum = momentum, .dampening = 0, .weight_decay = 0, .nesterov = nesterov};
  with_state_bits(group.state_bits, [&]<int kBits>(std::integral_constant<int, kBits>) {
    launch_slots<Direction<Grad>, Moment<kBits, true>>({&group.slots[0]}, group, rule, stream);
  });
}

}  // namespace memkernels::cuda
