// Teams: the blocks that share an index in x, one a number in y, and sum what each of them has. A grid of teams is
// launched by `launch_teams`, since its blocks wait for each other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda_reduce.cuh"

namespace memkernels::cuda {

constexpr int kMostTeam = 32;  // blocks: a lane of a warp for each
constexpr int kTeamFloats = 2;

// 64-bit words of memory that the teams sum through, zeros before the launch.
inline int64_t team_words(int64_t teams, int blocks) {
  return blocks == 1 ? 0 : 2 * teams * blocks * kTeamFloats;
}

// Sums over teams of `Threads` threads a block, one after another.
//
// A float goes to the other blocks in one word with the number of the sum, which tells it from what the word held
// before: whoever reads the number has the float too, without a fence. Sums of even and of odd number have words of
// their own, which is enough: a block writes sum i + 2 when it has the parts of sum i + 1, and each block wrote that
// part after it had read those of sum i.
template <int Threads>
class TeamSums {
 public:
  __device__ __forceinline__ explicit TeamSums(unsigned long long* words) : words_(words) {}

  // Every thread of the team gets the result, of the same bits. The number is 1 at first, and then one more each time;
  // V is a float or kTeamFloats of them.
  template <typename V, typename Add>
  __device__ __forceinline__ V operator()(uint32_t number, V value, Add add) const {
    static_assert(sizeof(V) % sizeof(float) == 0 && sizeof(V) <= kTeamFloats * sizeof(float));
    value = block_reduce<Threads>(value, add);
    if (gridDim.y == 1) return value;
    unsigned long long* words = words_ + (int64_t{blockIdx.x} * 2 + number % 2) * gridDim.y * kTeamFloats;
    constexpr int kFloats = sizeof(V) / sizeof(float);
    uint32_t parts[kFloats];
    memcpy(parts, &value, sizeof(V));
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kFloats; ++i) {
        atomicExch(words + blockIdx.y * kTeamFloats + i, static_cast<unsigned long long>(number) << 32 | parts[i]);
      }
    }
    const unsigned int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kFloats; ++i)
      parts[i] = lane < gridDim.y ? wait_for(words + lane * kTeamFloats + i, number) : 0;
    memcpy(&value, parts, sizeof(V));
    return warp_reduce(value, add);
  }

 private:
  __device__ __forceinline__ static uint32_t wait_for(unsigned long long* word, uint32_t number) {
    unsigned long long seen;
    while ((seen = atomicAdd(word, 0ull)) >> 32 != number) __nanosleep(32);
    return static_cast<uint32_t>(seen);
  }

  unsigned long long* words_;
};

}  // namespace memkernels::cuda
