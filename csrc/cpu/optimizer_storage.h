// How an optimizer's tensors are stored: parameters and moments, by runs of 256 elements.
//
// Each type is a pointer or two into a tensor. Of a run that begins with the tensor's element `first` and has `count`
// elements: begin(first, count) reads what must be decoded, zeros beyond; get(i) and put(i, v) are the values from
// element i of the run on; end() writes what must be encoded. arrays(n, visit) hands over each pointer with how many of
// its elements n of the tensor's take.
#pragma once

#include "common/bfloat16_bits.h"
#include "common/dynamic_code.h"
#include "common/optimizer_slots.h"
#include "cpu/absmax.h"
#include "cpu/bits16.h"
#include "cpu/bytes.h"
#include "cpu/nibbles.h"
#include "cpu/vec_lanes.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

struct PlainFloat {
  float* data;

  template <typename Visit>
  void arrays(int64_t n, Visit&& visit) {
    visit(data, n);
  }
  PlainFloat at(int64_t first) const { return {data + first}; }
  void begin(int64_t, int64_t) {}
  Vec get(int64_t i) const { return load(data + i); }
  void put(int64_t i, Vec v) { store(data + i, v); }
  void end() {}
};

struct StochasticBFloat16 {
  BFloat16* data;
  RandomPlace place;
  RandomBits random;

  StochasticBFloat16(BFloat16* data_, const RandomPlace& place_) : data(data_), place(place_) {}

  template <typename Visit>
  void arrays(int64_t n, Visit&& visit) {
    visit(data, n);
  }
  StochasticBFloat16 at(int64_t first) const { return {data + first, place}; }
  void begin(int64_t first, int64_t) { random.fill(place, first); }
  Vec get(int64_t i) const { return load(data + i); }
  void put(int64_t i, Vec v) { store_bits(data + i, rounded_at_random<VecLanes>(v, random.at(i))); }
  void end() {}
};

struct SplitFloat {
  BFloat16* high;
  int16_t* low;

  template <typename Visit>
  void arrays(int64_t n, Visit&& visit) {
    visit(high, n);
    visit(low, n);
  }
  SplitFloat at(int64_t first) const { return {high + first, low + first}; }
  void begin(int64_t, int64_t) {}
  Vec get(int64_t i) const { return join<VecLanes>(load_bits(high + i), load_bits(low + i)); }
  void put(int64_t i, Vec v) {
    const Halves<IntVec> halves = split<VecLanes>(v);
    store_bits(high + i, halves.high);
    store_bits(low + i, halves.low);
  }
  void end() {}
};

template <bool kSigned>
struct Codes8 {
  static constexpr const auto& kCode = kStateCode<8, kSigned>;
  uint8_t* codes;
  float* absmax;
  float values[kRun];

  Codes8(uint8_t* codes_, float* absmax_) : codes(codes_), absmax(absmax_) {}

  template <typename Visit>
  void arrays(int64_t n, Visit&& visit) {
    visit(codes, n);
    visit(absmax, (n + kBlock8 - 1) / kBlock8);
  }
  Codes8 at(int64_t first) const { return {codes + first, absmax + first / kBlock8}; }

  void begin(int64_t, int64_t count) {
    const float scale = *absmax;
    for (int64_t i = 0; i < kRun; i += kLanes) {
      store(values + i, kCode.template decode<VecLanes>(load_bytes(codes + i)) * scale);
    }
    std::fill(values + count, values + kRun, 0.0f);
  }
  Vec get(int64_t i) const { return load(values + i); }
  void put(int64_t i, Vec v) { store(values + i, v); }
  void end() {
    *absmax = absolute_maximum(values, kRun);
    const float inverse = 1.0f / std::max(*absmax, kLeastAbsmax);
    for (int64_t i = 0; i < kRun; i += kLanes) {
      store_bytes(codes + i, kCode.template encode<VecLanes>(load(values + i) * inverse));
    }
  }
};

template <bool kSigned>
struct Codes4 {
  static constexpr const auto& kCode = kStateCode<4, kSigned>;
  uint8_t* packed;
  float* absmax;
  float values[kRun];

  Codes4(uint8_t* packed_, float* absmax_) : packed(packed_), absmax(absmax_) {}

  template <typename Visit>
  void arrays(int64_t n, Visit&& visit) {
    visit(packed, (n + 1) / 2);
    visit(absmax, (n + kBlock4 - 1) / kBlock4);
  }
  Codes4 at(int64_t first) const { return {packed + first / 2, absmax + first / kBlock4}; }

  void begin(int64_t, int64_t count) {
    float code[16];
    IntVec bytes;
    for (int64_t lane = 0; lane < kLanes; ++lane) bytes[lane] = static_cast<int32_t>(lane);
    for (int64_t i = 0; i < 16; i += kLanes) {
      store(code + i, kCode.template decode<VecLanes>(bytes + static_cast<int32_t>(i)));
    }
    for (int64_t block = 0; block < kRun / kBlock4; ++block) {
      const NibbleValues<float> of_block(code, absmax[block]);
      of_block.expand(packed + block * kBlock4 / 2, values + block * kBlock4, kBlock4 / 2);
    }
    std::fill(values + count, values + kRun, 0.0f);
  }
  Vec get(int64_t i) const { return load(values + i); }
  void put(int64_t i, Vec v) { store(values + i, v); }
  void end() {
    for (int64_t block = 0; block < kRun / kBlock4; ++block) {
      const float* from = values + block * kBlock4;
      uint8_t* to = packed + block * kBlock4 / 2;
      absmax[block] = absolute_maximum(from, kBlock4);
      const float inverse = 1.0f / std::max(absmax[block], kLeastAbsmax);
      for (int64_t i = 0; i < kBlock4; i += 2 * kLanes) {
        store_nibbles(to + i / 2, kCode.template encode<VecLanes>(load(from + i) * inverse),
                      kCode.template encode<VecLanes>(load(from + i + kLanes) * inverse));
      }
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
