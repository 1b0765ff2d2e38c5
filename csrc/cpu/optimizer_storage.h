// How an optimizer's tensors are stored: parameters and moments, by runs of 256 elements.
//
// Each type is a pointer or two into a tensor. Of a run that begins with the tensor's element `first` and has `count`
// elements: begin(first, count) reads what must be decoded, zeros beyond; get(i) and put(i, v) are the values from
// element i of the run on; end() writes what must be encoded. arrays(n, visit) hands over each pointer with how many of
// its elements n of the tensor's take.
#pragma once

#include "common/dynamic_code.h"
#include "cpu/absmax.h"
#include "cpu/bits16.h"
#include "cpu/bytes.h"
#include "cpu/lookup.h"
#include "cpu/nibbles.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kRun = 256;
// Absolute maxima below this count as this when they divide: the reciprocal stays finite.
constexpr float kLeastDivisor = 1e-38f;

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
  void put(int64_t i, Vec v) { store_stochastic(data + i, v, random.at(i)); }
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
  Vec get(int64_t i) const { return join(load_bits(high + i), load_bits(low + i)); }
  void put(int64_t i, Vec v) { split(v, high + i, low + i); }
  void end() {}
};

// Codes of a value over its block's absmax. `byte` is the number that is stored.
template <int kBits, bool kSigned>
struct Dynamic {
  static constexpr const auto& kCode = kDynamicCode<kBits, kSigned>;

  static Vec decode(IntVec byte) {
    IntVec number = byte;
    if constexpr (kSigned) {
      const IntVec offset = byte - kCode.kZero;
      number = offset < 0 ? -offset : offset;
    }
    const Vec t = __builtin_convertvector(number, Vec) + (0.5f + kCode.kShift);
    const IntVec bits = bits_as<IntVec>(t);
    const Vec cells = bits_as<Vec>(bits & 0x7f800000);
    const Vec magnitude = (18.0f * t - 16.0f * cells) * lookup(kCode.scale, bits >> 23);
    if constexpr (!kSigned) return magnitude;
    return bits_as<Vec>(bits_as<IntVec>(magnitude) | ((byte - kCode.kZero) & static_cast<int32_t>(0x80000000)));
  }

  static IntVec encode(Vec v) {
    const Vec magnitude = max(bits_as<Vec>(bits_as<IntVec>(v) & 0x7fffffff), broadcast(5e-10f));
    const IntVec binade = bits_as<IntVec>(magnitude) >> 23;
    const IntVec class_ = lookup(kCode.first_class, binade) - (magnitude > lookup(kCode.border, binade));
    const Vec exact = magnitude * lookup(kCode.slope, class_) + lookup(kCode.shift, class_);
    IntVec number = __builtin_convertvector(min(exact, lookup(kCode.last, class_)), IntVec);
    if constexpr (!kSigned) {
      // What is not zero is not stored as zero: of a second moment it would leave eps alone in the denominator.
      const IntVec least = (v > 0.0f) & 1;
      return number > least ? number : least;
    }
    // One has no negative counterpart.
    const IntVec negative = number < kCode.kZero ? number : IntVec{} + kCode.kZero;
    return kCode.kZero + (v < 0.0f ? -negative : number);
  }
};

// The sixteenths from 1/16 to 1: no zero, as Li et al. require of second moments.
struct Linear4 {
  static Vec decode(IntVec byte) { return (__builtin_convertvector(byte, Vec) + 1.0f) * 0.0625f; }
  static IntVec encode(Vec v) {
    return __builtin_convertvector(max(min(v * 16.0f - 0.5f, broadcast(15.0f)), Vec{}), IntVec);
  }
};

template <bool kSigned>
struct Codes8 {
  using Code = Dynamic<8, kSigned>;
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
      store(values + i, Code::decode(load_bytes(codes + i)) * scale);
    }
    std::fill(values + count, values + kRun, 0.0f);
  }
  Vec get(int64_t i) const { return load(values + i); }
  void put(int64_t i, Vec v) { store(values + i, v); }
  void end() {
    *absmax = absolute_maximum(values, kRun);
    const float inverse = 1.0f / std::max(*absmax, kLeastDivisor);
    for (int64_t i = 0; i < kRun; i += kLanes) {
      store_bytes(codes + i, Code::encode(load(values + i) * inverse));
    }
  }
};

template <bool kSigned>
struct Codes4 {
  using Code = std::conditional_t<kSigned, Dynamic<4, true>, Linear4>;
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
    for (int64_t i = 0; i < 16; i += kLanes) store(code + i, Code::decode(bytes + static_cast<int32_t>(i)));
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
      const float inverse = 1.0f / std::max(absmax[block], kLeastDivisor);
      for (int64_t i = 0; i < kBlock4; i += 2 * kLanes) {
        store_nibbles(to + i / 2, Code::encode(load(from + i) * inverse),
                      Code::encode(load(from + i + kLanes) * inverse));
      }
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
