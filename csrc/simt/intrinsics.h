#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "vector_types.h"

namespace memkernels::simt {

inline Lanes exchange(uint32_t mask, uint64_t value) {
  return current_block->exchange(mask, current_thread, value);
}

// The value of lane `source`, or the caller's own where the source is outside its segment of `width` lanes.
template <typename T, typename Source>
T shuffle(uint32_t mask, T value, int width, Source source_of) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const Lanes lanes = exchange(mask, word);
  const int lane = current_thread % kWarpSize;
  const int first = lane / width * width;
  const int source = source_of(lane, first);
  if (source < first || source >= first + width) return value;
  if (!(lanes.active >> source & 1)) throw std::logic_error("shuffle reads a lane that does not take part in it");
  std::memcpy(&value, &lanes.value[source], sizeof(T));
  return value;
}

inline uint32_t ballot(uint32_t mask, bool predicate) {
  const Lanes lanes = exchange(mask, predicate);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes.active >> lane & 1) votes |= static_cast<uint32_t>(lanes.value[lane]) << lane;
  }
  return votes;
}

}  // namespace memkernels::simt

inline void __syncthreads() {
  memkernels::simt::current_block->synchronize();
}
inline void __syncwarp(unsigned int mask = 0xFFFFFFFFu) {
  memkernels::simt::exchange(mask, 0);
}

template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, int width = warpSize) {
  return memkernels::simt::shuffle(mask, value, width, [=](int, int first) { return first + (source & (width - 1)); });
}
template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = warpSize) {
  return memkernels::simt::shuffle(mask, value, width, [=](int lane, int) { return lane - static_cast<int>(delta); });
}
template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = warpSize) {
  return memkernels::simt::shuffle(mask, value, width, [=](int lane, int) { return lane + static_cast<int>(delta); });
}
template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = warpSize) {
  return memkernels::simt::shuffle(mask, value, width, [=](int lane, int) { return lane ^ lane_mask; });
}

inline unsigned int __ballot_sync(unsigned int mask, int predicate) {
  return memkernels::simt::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned int mask, int predicate) {
  return memkernels::simt::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned int mask, int predicate) {
  return memkernels::simt::ballot(mask, predicate == 0) == 0;
}

inline unsigned int __float_as_uint(float value) {
  return std::bit_cast<unsigned int>(value);
}
inline float __uint_as_float(unsigned int bits) {
  return std::bit_cast<float>(bits);
}

inline void __nanosleep(unsigned int) {
  memkernels::simt::current_block->sleep();
}

// Byte i of the result is that of y and x, as one word, that the i-th hexadecimal digit of `selector` numbers; none of
// the digits is above 7.
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t{static_cast<uint8_t>(both >> (selector >> 4 * i & 7) * 8)} << 8 * i;
  return result;
}

// volatile: rounded on its own, never fused with another operation.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}

inline void __stwb(uint4* address, uint4 value) {
  *address = value;
}

inline float __expf(float x) {
  return std::exp(x);
}
