// NF4 (csrc/common/nf4.h has the formulas): quantisation of blocks, and dequantisation of a rectangle of a matrix.
#include "common/nf4.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "common/kernel_table.h"
#include "common/nf4_tensors.h"
#include "cpu/absmax.h"
#include "cpu/bytes.h"
#include "cpu/lookup.h"
#include "cpu/nibbles.h"
#include "cpu/outputs.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kElementsPerTask = 32768;
constexpr int64_t kElementsInCache = 2048;  // read twice

constexpr Nf4Table kValues = nf4_values(), kMidpoints = nf4_midpoints();

#if defined(CPU_CAPABILITY_AVX512)

// [-1, 1] in 31 cells, narrower than codes: a cell holds one midpoint at most, so that its first code and one
// comparison give the code. The offset rounds to the cell's number, and leaves it in the sum's low bits.
constexpr float kCellsPerUnit = 15.4f, kMiddleCell = 16.0f, kCellOffset = 0x1.8p23f + kMiddleCell;
constexpr auto kFirstCodes = [] {
  std::array<int32_t, 32> codes{};
  for (int cell = 0; cell < 32; ++cell) {
    // A little wider than the cell, for the product's rounding.
    const float least = (static_cast<float>(cell) - 0.51f - kMiddleCell) / kCellsPerUnit;
    while (kMidpoints.value[codes[cell]] < least) ++codes[cell];
  }
  return codes;
}();

inline IntVec codes_of(Vec v) {
  const __m512i cell = bits_as<__m512i>(v * kCellsPerUnit + kCellOffset);
  const __m512i first = _mm512_permutex2var_epi32(_mm512_loadu_si512(kFirstCodes.data()), cell,
                                                  _mm512_loadu_si512(kFirstCodes.data() + 16));
  const __m512 midpoint = _mm512_permutexvar_ps(first, _mm512_loadu_ps(kMidpoints.value));
  // The compiler makes two instructions of a difference with the comparison.
  const __mmask16 above = _mm512_cmp_ps_mask(v, midpoint, _CMP_GT_OQ);
  return bits_as<IntVec>(_mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1)));
}

#elif defined(CPU_CAPABILITY_AVX2)

// One more bit of a code: above which of the midpoints between the halves of what is left, by the bits so far, v lies.
inline IntVec with_next_bit(IntVec code, Vec v, Vec midpoints) {
  return code + code - (v > bits_as<Vec>(_mm256_permutevar8x32_ps(midpoints, bits_as<__m256i>(code))));
}

inline IntVec codes_of(Vec v) {
  constexpr auto& m = kMidpoints.value;
  IntVec code = with_next_bit(-(v > m[7]), v, Vec{m[3], m[11]});
  code = with_next_bit(code, v, Vec{m[1], m[5], m[9], m[13]});
  return with_next_bit(code, v, Vec{m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]});
}

#else

inline IntVec codes_of(Vec v) {
  IntVec codes{};
  for (int i = 0; i + 1 < kNf4Codes; ++i) codes -= v > kMidpoints.value[i];
  return codes;
}

#endif

// Twice kLanes values.
template <typename T>
inline void quantize_vectors(const T* values, float inverse, uint8_t* packed) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // The two of a 32-bit lane share a byte.
    IntVec pairs;
    std::memcpy(&pairs, values, sizeof(pairs));
    const Vec first = bits_as<Vec>(pairs << 16), second = bits_as<Vec>(pairs & ~0xffff);
    store_bytes(packed, (codes_of(first * inverse) << 4) + codes_of(second * inverse));
  } else {
    store_nibbles(packed, codes_of(load(values) * inverse), codes_of(load(values + kLanes) * inverse));
  }
}

template <typename T>
void quantize_block(const T* values, int64_t n, float absmax, uint8_t* packed) {
  const float inverse = 1.0f / std::max(absmax, kLeastAbsmax);
  for (int64_t i = 0; i < n; i += 2 * kLanes) quantize_vectors(values + i, inverse, packed + i / 2);
}

// Some blocks: all their maxima first, since the codes of each wait for its own.
template <typename T>
void quantize_blocks(const T* values, int64_t blocks, int64_t block_size, float* maxima, uint8_t* packed) {
  for (int64_t block = 0; block < blocks; ++block) {
    maxima[block] = absolute_maximum(values + block * block_size, block_size);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    quantize_block(values + block * block_size, block_size, maxima[block], packed + block * block_size / 2);
  }
}

// The last block of a tensor, of n values. bitsandbytes divides there, and stores no absmax below kLeastAbsmax.
template <typename T>
float quantize_incomplete_block(const T* values, int64_t n, uint8_t* packed) {
  float scaled[kNf4MaxBlock] = {};
  uint8_t bytes[kNf4MaxBlock / 2];
  std::copy_n(values, n, scaled);
  const int64_t whole = (n + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  const float absmax = std::max(absolute_maximum(scaled, whole), kLeastAbsmax);
  for (int64_t i = 0; i < whole; i += 2 * kLanes) {
    store_nibbles(bytes + i / 2, codes_of(load(scaled + i) / absmax), codes_of(load(scaled + i + kLanes) / absmax));
  }
  std::memcpy(packed, bytes, (n + 1) / 2);
  return absmax;
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& values_in, int64_t block_size) {
  check_nf4_block_size(block_size);
  const Tensor values = as_contiguous(values_in);
  const int64_t size = values.numel(), whole_blocks = size / block_size, rest = size % block_size;
  Tensor packed = new_output(values, {(size + 1) / 2}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(values, {whole_blocks + (rest != 0)}, ScalarType::Float);
  uint8_t* bytes = packed.mutable_data_ptr<uint8_t>();
  float* maxima = absmax.mutable_data_ptr<float>();
  dispatch_floating("values", values, [&]<typename T>() {
    const T* data = values.const_data_ptr<T>();
    torch::stable::parallel_for(0, whole_blocks, kElementsPerTask / block_size, [=](int64_t begin, int64_t end) {
      const int64_t step = std::max<int64_t>(1, kElementsInCache / block_size);
      for (int64_t block = begin; block < end; block += step) {
        const int64_t first = block * block_size, blocks = std::min(step, end - block);
        quantize_blocks(data + first, blocks, block_size, maxima + block, bytes + first / 2);
      }
    });
    if (rest != 0) {
      const int64_t first = whole_blocks * block_size;
      maxima[whole_blocks] = quantize_incomplete_block(data + first, rest, bytes + first / 2);
    }
  });
  return {packed, absmax};
}

// The midpoints between neighbours of the ascending 8-bit code, with a last one that no value is above.
struct NestedMidpoints {
  float value[256];
  float last_of_eight[32], fourth_of_eight[32];

  explicit NestedMidpoints(const float* code) {
    for (int i = 0; i < 255; ++i) value[i] = (code[i] + code[i + 1]) / 2;
    value[255] = std::numeric_limits<float>::infinity();
    for (int i = 0; i < 32; ++i) {
      last_of_eight[i] = value[8 * i + 7];
      fourth_of_eight[i] = value[8 * i + 3];
    }
  }

  // How many are below each lane.
  IntVec below(Vec v) const {
    IntVec count{};
    int half = 128;
    // A gather takes several times as long as a permutation, which is enough for the first bits.
#if defined(CPU_CAPABILITY_AVX512)
    for (int eights = 16; eights > 0; eights /= 2) {
      count += (v > lookup(last_of_eight, count + (eights - 1))) & eights;
    }
    count = (count + count - (v > lookup(fourth_of_eight, count))) << 2;
    half = 2;
#elif defined(CPU_CAPABILITY_AVX2)
    const Vec first = {value[63], value[191]}, second = {value[31], value[95], value[159], value[223]};
    const Vec third = {value[15], value[47], value[79], value[111], value[143], value[175], value[207], value[239]};
    count = with_next_bit(with_next_bit(with_next_bit(-(v > value[127]), v, first), v, second), v, third) << 4;
    half = 8;
#endif
    for (; half > 0; half /= 2) count += (v > gather(value + half - 1, count)) & half;
    return count;
  }
};

// As blocks of NF4 are: the last one divides, if it is incomplete, and has an absmax of at least kLeastAbsmax.
float quantize_nested_block(const float* absmax, int64_t n, float offset, const NestedMidpoints& midpoints,
                            uint8_t* codes) {
  float values[kNestedBlock] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = absmax[i] - offset;
  const float largest = absolute_maximum(values, kNestedBlock);
  const float divisor = std::max(largest, kLeastAbsmax), inverse = 1.0f / divisor;
  const bool whole = n == kNestedBlock;
  uint8_t bytes[kNestedBlock];
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(values + i);
    store_bytes(bytes + i, midpoints.below(whole ? v * inverse : v / divisor));
  }
  std::copy_n(bytes, n, codes);
  return whole ? largest : divisor;
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax(const Tensor& absmax_in, const Tensor& offset, const Tensor& code_in) {
  check_dtype("absmax", absmax_in, ScalarType::Float);
  check_one_element("offset", offset, ScalarType::Float);
  check_tensor("code", code_in, ScalarType::Float, {256});
  const Tensor absmax = as_contiguous(absmax_in), code = as_contiguous(code_in);
  const int64_t n = absmax.numel(), blocks = (n + kNestedBlock - 1) / kNestedBlock;
  Tensor codes = torch::stable::new_empty(absmax, {n}, ScalarType::Byte);
  Tensor nested_absmax = torch::stable::new_empty(absmax, {blocks}, ScalarType::Float);
  const float* values = absmax.const_data_ptr<float>();
  const float shift = *offset.const_data_ptr<float>();
  uint8_t* bytes = codes.mutable_data_ptr<uint8_t>();
  float* maxima = nested_absmax.mutable_data_ptr<float>();
  const NestedMidpoints midpoints(code.const_data_ptr<float>());
  torch::stable::parallel_for(0, blocks, kElementsPerTask / kNestedBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kNestedBlock;
      maxima[block] =
          quantize_nested_block(values + first, std::min(kNestedBlock, n - first), shift, midpoints, bytes + first);
    }
  });
  return {codes, nested_absmax};
}

inline float absmax_of(const Nf4Scales& scales, int64_t block) {
  if (scales.codes == nullptr) return scales.absmax[block];
  // volatile: the product is rounded before the sum, and not fused with it.
  volatile float product = scales.nested_code[scales.codes[block]] * scales.nested_absmax[block / kNestedBlock];
  return product + *scales.offset;
}

// `size` elements from element `first` on, of the whole tensor, by blocks.
template <typename T>
void dequantize_row(const uint8_t* packed, const Nf4Scales& scales, int64_t block_size, int64_t first, int64_t size,
                    T* out) {
  const int64_t last = first + size;
  for (int64_t block = first / block_size; first < last; ++block) {
    const int64_t end = std::min(last, (block + 1) * block_size);
    const NibbleValues<T> values(kValues.value, absmax_of(scales, block));
    if (first % 2 != 0) *out++ = values[packed[first++ / 2] & 15];
    const int64_t bytes = (end - first) / 2;
    values.expand(packed + first / 2, out, bytes);
    out += 2 * bytes;
    first += 2 * bytes;
    if (first < end) *out++ = values[packed[first++ / 2] >> 4];
  }
}

void nf4_dequantize_(Tensor out, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                     const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset, int64_t block_size,
                     int64_t row_size, int64_t first_row, int64_t first_column) {
  check_dim("out", out, 2);
  const int64_t rows = out.size(0), columns = out.size(1), out_stride = out.stride(0);
  if (rows == 0 || columns == 0) return;
  const Nf4Storage storage = contiguous_nf4(packed, absmax, nested_absmax, nested_code, offset);
  storage.check(out, block_size, row_size, first_row, first_column);
  const Nf4Scales scales = storage.scales();
  const uint8_t* bytes = storage.packed.const_data_ptr<uint8_t>();
  dispatch_floating("out", out, [&]<typename T>() {
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / columns),
                                [=](int64_t begin, int64_t last) {
                                  for (int64_t row = begin; row < last; ++row) {
                                    const int64_t first = (first_row + row) * row_size + first_column;
                                    dequantize_row(bytes, scales, block_size, first, columns, to + row * out_stride);
                                  }
                                });
  });
}

MEMKERNELS_CPU_KERNEL(nf4_quantize);
MEMKERNELS_CPU_KERNEL(nf4_quantize_absmax);
MEMKERNELS_CPU_KERNEL(nf4_dequantize_);

}  // namespace
}  // namespace memkernels::cpu
