// How an optimizer's tensors are stored: parameters and moments, by runs of 256 elements, of which a warp holds one.
// A lane has two quads of neighbours, 128 elements apart: each load and store of the warp is one stretch of memory, a
// quad is what a block of 4-bit codes has of a lane, and two what one of 8-bit codes has.
//
// Each type is a pointer or two into a tensor. load(run, values) gives this lane's values, zeros beyond the run;
// store(run, values) writes them; is_aligned() says whether quads can be read at once. All lanes of a warp call them,
// after all threads of the block have called prepare() and a barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../common/bfloat16_bits.h"
#include "../common/cuda_lanes.cuh"
#include "../common/cuda_pack.cuh"
#include "../common/cuda_reduce.cuh"
#include "../common/cuda_shared.cuh"
#include "../common/dynamic_code.h"
#include "../common/optimizer_slots.h"
#include "../common/philox.h"

namespace memkernels::cuda {

constexpr int kOptimizerThreads = 128;
constexpr int kOptimizerWarps = kOptimizerThreads / 32;
constexpr int kQuad = 4, kQuads = 2;

struct Run {
  int64_t first;  // which of the tensor's elements begins it
  int count;      // of elements, 256 at most
  bool whole;     // 256, and every tensor of the parameter is aligned
};

struct Values {
  float value[kQuads][kQuad];
};

__device__ __forceinline__ int lane() {
  return static_cast<int>(threadIdx.x) % 32;
}

// The first element of a lane's quad, counted from the run's first.
__device__ __forceinline__ int first_of(int quad) {
  return quad * (32 * kQuad) + lane() * kQuad;
}

// data[at, at + N), of which those below `end` exist; zeros beyond. At once if `whole`.
template <int N, typename T>
__device__ __forceinline__ void load_group(const T* data, int at, int end, bool whole, T (&out)[N]) {
  if (whole) {
    const auto pack = *reinterpret_cast<const Pack<T, N>*>(data + at);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = pack.value[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = at + i < end ? data[at + i] : T{};
  }
}

template <int N, typename T>
__device__ __forceinline__ void store_group(T* data, int at, int end, bool whole, const T (&in)[N]) {
  if (whole) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.value[i] = in[i];
    *reinterpret_cast<Pack<T, N>*>(data + at) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (at + i < end) data[at + i] = in[i];
    }
  }
}

// float32 itself, bfloat16 by its bits.
__device__ __forceinline__ float widened(float value) {
  return value;
}
__device__ __forceinline__ float widened(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

template <typename T>
__device__ __forceinline__ void load_values(const T* data, const Run& run, Values& values) {
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    T stored[kQuad];
    load_group(data + run.first, first_of(quad), run.count, run.whole, stored);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) values.value[quad][i] = widened(stored[i]);
  }
}

// Words of Philox on their way between the lanes of a warp: of 48 counters, which serve a run wherever it begins.
struct alignas(16) RandomWords {
  uint32_t word[kOptimizerWarps][4][48];
};

// The random bits of a lane's elements. Each lane makes the four words of one of the run's 32 counters, or of 48, and
// takes from those what RandomPlace says that its elements have: four neighbours at once where the run begins with a
// counter's first element.
__device__ __forceinline__ void random_bits(const RandomPlace& place, int64_t first, int32_t (&bits)[kQuads][kQuad]) {
  auto& shared = shared_memory<RandomWords>().word[threadIdx.x / 32];
  const int before = static_cast<int>((place.origin + first) % 128);
  __syncwarp();  // what another tensor's call reads there is read
#pragma unroll 1
  for (int counter = lane(); counter < (before == 0 ? 32 : 48); counter += 32) {
    uint32_t words[4] = {place.counter(first) + counter, place.tensor, place.parameter, place.step};
    philox(words, place.seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[i][counter] = words[i];
  }
  __syncwarp();
  if (before > 0) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const int at = before + first_of(quad) + i;
        bits[quad][i] = shared[at % 128 / 32][at / 128 * 16 + at % 16] >> (at / 16 % 2 * 16) & 0xFFFF;
      }
    }
    return;
  }
  const int shift = lane() / 4 % 2 * 16;
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const auto four = *reinterpret_cast<const Pack<uint32_t, kQuad>*>(&shared[lane() / 8][quad * 16 + lane() % 4 * 4]);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) bits[quad][i] = static_cast<int32_t>(four.value[i] >> shift & 0xFFFFu);
  }
}

struct PlainFloat {
  using Stored = float;
  float* data;

  __device__ __forceinline__ static void prepare() {}
  __device__ __forceinline__ bool is_aligned() const { return cuda::is_aligned(data, kQuad * sizeof(float)); }
  __device__ __forceinline__ void load(const Run& run, Values& values) const { load_values(data, run, values); }
  __device__ __forceinline__ void store(const Run& run, const Values& values) const {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      store_group(data + run.first, first_of(quad), run.count, run.whole, values.value[quad]);
    }
  }
};

struct StochasticBFloat16 {
  using Stored = uint16_t;
  uint16_t* data;
  RandomPlace place;

  __device__ __forceinline__ static void prepare() {}
  __device__ __forceinline__ bool is_aligned() const { return cuda::is_aligned(data, kQuad * sizeof(uint16_t)); }
  __device__ __forceinline__ void load(const Run& run, Values& values) const { load_values(data, run, values); }
  __device__ __forceinline__ void store(const Run& run, const Values& values) const {
    int32_t random[kQuads][kQuad];
    random_bits(place, run.first, random);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint16_t stored[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        stored[i] = static_cast<uint16_t>(rounded_at_random<OneLane>(values.value[quad][i], random[quad][i]));
      }
      store_group(data + run.first, first_of(quad), run.count, run.whole, stored);
    }
  }
};

struct SplitFloat {
  using Stored = uint16_t;
  uint16_t* high;
  uint16_t* low;

  __device__ __forceinline__ bool is_aligned() const {
    return cuda::is_aligned(high, kQuad * sizeof(uint16_t)) && cuda::is_aligned(low, kQuad * sizeof(uint16_t));
  }
  __device__ __forceinline__ void load(const Run& run, Values& values) const {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint16_t upper[kQuad], lower[kQuad];
      load_group(high + run.first, first_of(quad), run.count, run.whole, upper);
      load_group(low + run.first, first_of(quad), run.count, run.whole, lower);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) values.value[quad][i] = join<OneLane>(upper[i], lower[i]);
    }
  }
  __device__ __forceinline__ void store(const Run& run, const Values& values) const {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint16_t upper[kQuad], lower[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const Halves<int32_t> halves = split<OneLane>(values.value[quad][i]);
        upper[i] = static_cast<uint16_t>(halves.high);
        lower[i] = static_cast<uint16_t>(halves.low);
      }
      store_group(high + run.first, first_of(quad), run.count, run.whole, upper);
      store_group(low + run.first, first_of(quad), run.count, run.whole, lower);
    }
  }
};

__device__ __forceinline__ float inverse_of(float absmax) {
  return 1.0f / (absmax < kLeastAbsmax ? kLeastAbsmax : absmax);
}

// The tables of codes are in shared memory: a warp looks up as many elements of one at a time.
template <typename Code>
__device__ __forceinline__ void share(Code& shared) {
  static constexpr Code kCode = Code::make();
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(Code) / 4); i += kOptimizerThreads) {
    memcpy(reinterpret_cast<char*>(&shared) + 4 * i, reinterpret_cast<const char*>(&kCode) + 4 * i, 4);
  }
}
__device__ __forceinline__ void share(LinearCode&) {}

// A block of 256 is a run.
template <bool kSigned>
struct Codes8 {
  using Code = StateCode<8, kSigned>;
  uint8_t* codes;
  float* absmax;

  __device__ __forceinline__ static void prepare() { share(shared_memory<Code>()); }
  __device__ __forceinline__ bool is_aligned() const { return cuda::is_aligned(codes, kQuad); }
  __device__ __forceinline__ void load(const Run& run, Values& values) const {
    const Code& code = shared_memory<Code>();
    const float scale = absmax[run.first / kBlock8];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint8_t stored[kQuad];
      load_group(codes + run.first, first_of(quad), run.count, run.whole, stored);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const float value = code.template decode<OneLane>(stored[i]) * scale;
        values.value[quad][i] = first_of(quad) + i < run.count ? value : 0.0f;
      }
    }
  }
  __device__ __forceinline__ void store(const Run& run, const Values& values) const {
    const Code& code = shared_memory<Code>();
    const uint32_t of_lane = Larger()(largest_of(values.value[0]), largest_of(values.value[1]));
    const float largest = __uint_as_float(warp_reduce(of_lane, Larger()));
    const float inverse = inverse_of(largest);
    if (lane() == 0) absmax[run.first / kBlock8] = largest;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint8_t stored[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        stored[i] = static_cast<uint8_t>(code.template encode<OneLane>(values.value[quad][i] * inverse));
      }
      store_group(codes + run.first, first_of(quad), run.count, run.whole, stored);
    }
  }
};

// A block of 128 is the quads of one number. Two neighbours are a byte, the first its high half.
template <bool kSigned>
struct Codes4 {
  using Code = StateCode<4, kSigned>;
  uint8_t* packed;
  float* absmax;

  __device__ __forceinline__ static void prepare() { share(shared_memory<Code>()); }
  __device__ __forceinline__ bool is_aligned() const { return cuda::is_aligned(packed, kQuad / 2); }
  __device__ __forceinline__ void load(const Run& run, Values& values) const {
    const Code& code = shared_memory<Code>();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const float scale = quad * kBlock4 < run.count ? absmax[run.first / kBlock4 + quad] : 0.0f;
      uint8_t stored[kQuad / 2];
      load_group(packed + run.first / 2, first_of(quad) / 2, (run.count + 1) / 2, run.whole, stored);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const int32_t nibble = i % 2 == 0 ? stored[i / 2] >> 4 : stored[i / 2] & 15;
        const float value = code.template decode<OneLane>(nibble) * scale;
        values.value[quad][i] = first_of(quad) + i < run.count ? value : 0.0f;
      }
    }
  }
  __device__ __forceinline__ void store(const Run& run, const Values& values) const {
    const Code& code = shared_memory<Code>();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const float largest = __uint_as_float(warp_reduce(largest_of(values.value[quad]), Larger()));
      const float inverse = inverse_of(largest);
      if (lane() == 0 && quad * kBlock4 < run.count) absmax[run.first / kBlock4 + quad] = largest;
      int32_t nibbles[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) nibbles[i] = code.template encode<OneLane>(values.value[quad][i] * inverse);
      const uint8_t stored[kQuad / 2] = {static_cast<uint8_t>(nibbles[0] << 4 | nibbles[1]),
                                         static_cast<uint8_t>(nibbles[2] << 4 | nibbles[3])};
      store_group(packed + run.first / 2, first_of(quad) / 2, (run.count + 1) / 2, run.whole, stored);
    }
  }
};

// How moments of a width are stored.
template <int kBits, bool kSigned>
using Moment = std::conditional_t<kBits == 32, PlainFloat,
                                  std::conditional_t<kBits == 16, StochasticBFloat16,
                                                     std::conditional_t<kBits == 8, Codes8<kSigned>, Codes4<kSigned>>>>;

// The i-th moment of a parameter.
template <typename Storage>
__device__ __forceinline__ Storage moment_of(const Slot& slot, uint64_t seed, int i) {
  if constexpr (std::is_same_v<Storage, PlainFloat>) {
    return {static_cast<float*>(slot.moments[i])};
  } else if constexpr (std::is_same_v<Storage, StochasticBFloat16>) {
    return {static_cast<uint16_t*>(slot.moments[i]), random_place(slot, seed, 1 + i)};
  } else {
    return {static_cast<uint8_t*>(slot.moments[i]), slot.absmax[i]};
  }
}

template <typename Storage>
__device__ __forceinline__ Storage parameter_of(const Slot& slot, uint64_t seed) {
  if constexpr (std::is_same_v<Storage, SplitFloat>) {
    return {static_cast<uint16_t*>(slot.parameter), reinterpret_cast<uint16_t*>(slot.remainder)};
  } else if constexpr (std::is_same_v<Storage, StochasticBFloat16>) {
    return {static_cast<uint16_t*>(slot.parameter), random_place(slot, seed, 0)};
  } else {
    return {static_cast<decltype(Storage::data)>(slot.parameter)};
  }
}

}  // namespace memkernels::cuda
