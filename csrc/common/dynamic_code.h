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

#include <cstdint>
#include <limits>

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
  float scale[16] = {};
  // Encoding a magnitude: by the low five bits of its exponent, the class at the binade's lower end, and the border to
  // the next class within the binade, which no two share.
  float border[32] = {};
  int32_t first_class[32] = {};
  // By class: the number is min(trunc(magnitude * slope + shift), last).
  float slope[16] = {}, shift[16] = {}, last[16] = {};

  static constexpr double power_of_ten(int exponent) {
    double power = 1;
    for (; exponent < 0; ++exponent) power /= 10;
    return power;
  }

  static constexpr double cells(int decade) { return double(1 << (decade + kShift)); }
  static constexpr double scale_of(int decade) { return power_of_ten(decade - kDecades + 1) / (20 * cells(decade)); }

  // Between the last value of class c and the first of the next.
  static constexpr double border_above(int c) {
    const double below = c == 0 ? 0 : scale_of(c - 1) * (20 * cells(c - 1) - 9);
    const double above = c == kDecades ? 1 : scale_of(c) * (2 * cells(c) + 9);
    return (below + above) / 2;
  }

  constexpr DynamicCode() {
    for (int c = 1; c <= kDecades + 1; ++c) {
      const double p = cells(c - 1);
      const bool one = c == kDecades + 1;
      scale[(c + kShift + 14) % 16] = static_cast<float>(one ? 1 / (2 * p + 9) : scale_of(c - 1));
      slope[c] = static_cast<float>(one ? 0 : 1 / (18 * scale_of(c - 1)));
      shift[c] = static_cast<float>(one ? kOnes : 16 * p / 18 - kShift);
      last[c] = static_cast<float>(one ? kOnes : 2 * p - 1 - kShift);
    }
    double lower = 1;
    for (int binade = 0; binade > -32; --binade, lower /= 2) {
      const int at = (127 + binade) % 32;
      int c = 0;
      while (c <= kDecades && border_above(c) < lower) ++c;
      const double next = c <= kDecades ? border_above(c) : 4;
      first_class[at] = c;
      border[at] = next < 2 * lower ? static_cast<float>(next) : std::numeric_limits<float>::infinity();
    }
  }
};

template <int kBits, bool kSigned>
inline constexpr DynamicCode<kBits, kSigned> kDynamicCode{};

}  // namespace memkernels
