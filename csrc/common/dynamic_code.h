// Dynamic codes of 8 and 4 bits (Dettmers et al. 2021, arXiv 2110.02861, section 2.2; Li et al. 2023, arXiv 2309.01507,
// for 4 bits) of a value over its block's absmax, and the linear code of 4 bits for second moments.
//
// Magnitudes are 0, D decades and 1. Decade i, [10^(i - D), 10^(i - D + 1)], is cut into P = 2^i equal cells (2^(i + 1)
// without signs), whose centres are the code's values. With t = (number of the magnitude, counted from 0) + 1/2, and 1
// more without signs, t lies in [P, 2 P) just for the cells of one decade, so that the class of a magnitude (0 for
// zero, then the decades, then one) is the exponent of t, and
//   value = scale * (18 t - 16 P)     scale = 10^(i - D + 1) / (20 P)
// whose bracket is a whole number that float32 holds: every instruction set gets the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "lanes.h"
#include "least_absmax.h"

namespace memkernels {

// Blocks of elements, counted from a parameter's first, that share an absmax: by bits of the code.
constexpr int64_t kBlock8 = 256, kBlock4 = 128;

template <int kBits, bool kSigned>
struct DynamicCode {
  static constexpr int kDecades = kBits == 8 ? 7 : 3;
  static constexpr int kShift = kSigned ? 0 : 1;
  static constexpr int kOnes = (1 << (kBits - kSigned)) - (kSigned ? 0 : 1);  // the number of the magnitude 1
  static constexpr int kZero = kSigned ? kOnes - 1 : 0;                       // the code of zero

  // Indexed by the low four bits of t's biased exponent.
  float scale[16];
  // Encoding a magnitude: by the low five bits of its exponent, the class at the binade's lower end, and the border to
  // the next class within the binade, which no two share.
  float border[32];
  int32_t first_class[32];
  // By class: the number is min(trunc(magnitude * slope + shift), last).
  float slope[16], shift[16], last[16];

  MEMKERNELS_HOST_DEVICE static constexpr double power_of_ten(int exponent) {
    double power = 1;
    for (; exponent < 0; ++exponent) power /= 10;
    return power;
  }

  MEMKERNELS_HOST_DEVICE static constexpr double cells(int decade) { return double(1 << (decade + kShift)); }
  MEMKERNELS_HOST_DEVICE static constexpr double scale_of(int decade) {
    return power_of_ten(decade - kDecades + 1) / (20 * cells(decade));
  }

  // Between the last value of class c and the first of the next.
  MEMKERNELS_HOST_DEVICE static constexpr double border_above(int c) {
    const double below = c == 0 ? 0 : scale_of(c - 1) * (20 * cells(c - 1) - 9);
    const double above = c == kDecades ? 1 : scale_of(c) * (2 * cells(c) + 9);
    return (below + above) / 2;
  }

  MEMKERNELS_HOST_DEVICE static constexpr DynamicCode make() {
    DynamicCode code{};
    for (int c = 1; c <= kDecades + 1; ++c) {
      const double p = cells(c - 1);
      const bool one = c == kDecades + 1;
      code.scale[(c + kShift + 14) % 16] = static_cast<float>(one ? 1 / (2 * p + 9) : scale_of(c - 1));
      code.slope[c] = static_cast<float>(one ? 0 : 1 / (18 * scale_of(c - 1)));
      code.shift[c] = static_cast<float>(one ? kOnes : 16 * p / 18 - kShift);
      code.last[c] = static_cast<float>(one ? kOnes : 2 * p - 1 - kShift);
    }
    double lower = 1;
    for (int binade = 0; binade > -32; --binade, lower /= 2) {
      const int at = (127 + binade) % 32;
      int c = 0;
      while (c <= kDecades && border_above(c) < lower) ++c;
      const double next = c <= kDecades ? border_above(c) : 4;
      code.first_class[at] = c;
      code.border[at] = next < 2 * lower ? static_cast<float>(next) : INFINITY;
    }
    return code;
  }

  // The value of a code, `byte` the number that is stored.
  template <typename Lanes>
  MEMKERNELS_HOST_DEVICE typename Lanes::Float decode(typename Lanes::Int byte) const {
    using Float = typename Lanes::Float;
    using Int = typename Lanes::Int;
    Int number = byte;
    if constexpr (kSigned) {
      const Int offset = byte - kZero;
      number = offset < 0 ? -offset : offset;
    }
    const Float t = Lanes::from_int(number) + (0.5f + kShift);
    const Int bits = bits_as<Int>(t);
    const Float cells = bits_as<Float>(bits & 0x7f800000);
    const Float magnitude = (18.0f * t - 16.0f * cells) * Lanes::lookup(scale, bits >> 23);
    if constexpr (!kSigned) return magnitude;
    return bits_as<Float>(bits_as<Int>(magnitude) | ((byte - kZero) & static_cast<int32_t>(0x80000000)));
  }

  // The code of the value nearest to v, of magnitude 1 at most.
  template <typename Lanes>
  MEMKERNELS_HOST_DEVICE typename Lanes::Int encode(typename Lanes::Float v) const {
    using Float = typename Lanes::Float;
    using Int = typename Lanes::Int;
    const Float magnitude = Lanes::max(bits_as<Float>(bits_as<Int>(v) & 0x7fffffff), Float{} + 5e-10f);
    const Int binade = bits_as<Int>(magnitude) >> 23;
    const Int class_ = Lanes::lookup(first_class, binade) + Lanes::ones(magnitude > Lanes::lookup(border, binade));
    const Float exact = magnitude * Lanes::lookup(slope, class_) + Lanes::lookup(shift, class_);
    const Int number = Lanes::truncated(Lanes::min(exact, Lanes::lookup(last, class_)));
    if constexpr (!kSigned) {
      // What is not zero is not stored as zero: of a second moment it would leave eps alone in the denominator.
      const Int least = Lanes::ones(v > 0.0f);
      return number > least ? number : least;
    }
    // One has no negative counterpart.
    const Int negative = number < kZero ? number : Int{} + kZero;
    return kZero + (v < 0.0f ? -negative : number);
  }
};

// The sixteenths from 1/16 to 1: no zero, as Li et al. require of second moments.
struct LinearCode {
  MEMKERNELS_HOST_DEVICE static constexpr LinearCode make() { return {}; }

  template <typename Lanes>
  MEMKERNELS_HOST_DEVICE typename Lanes::Float decode(typename Lanes::Int byte) const {
    return (Lanes::from_int(byte) + 1.0f) * 0.0625f;
  }
  template <typename Lanes>
  MEMKERNELS_HOST_DEVICE typename Lanes::Int encode(typename Lanes::Float v) const {
    using Float = typename Lanes::Float;
    return Lanes::truncated(Lanes::max(Lanes::min(v * 16.0f - 0.5f, Float{} + 15.0f), Float{}));
  }
};

// Of moments with and without signs.
template <int kBits, bool kSigned>
using StateCode = std::conditional_t<kBits == 4 && !kSigned, LinearCode, DynamicCode<kBits, kSigned>>;

template <int kBits, bool kSigned>
inline constexpr StateCode<kBits, kSigned> kStateCode = StateCode<kBits, kSigned>::make();

}  // namespace memkernels
