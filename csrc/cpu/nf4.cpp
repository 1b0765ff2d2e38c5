// NF4 (csrc/common/nf4.h has the formulas): quantisation of blocks, and dequantisation of a rectangle of a matrix.
#include "common/nf4.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <tuple>

#include "common/kernel_table.h"
#include "common/nf4_tensors.h"
#include "cpu/outputs.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kElementsPerTask = 32768;

typedef uint64_t PairVec __attribute__((vector_size(kLanes * 4)));
typedef uint8_t PairBytes __attribute__((vector_size(kLanes / 2)));

constexpr Nf4Table kValues = nf4_values(), kMidpoints = nf4_midpoints();

#if defined(CPU_CAPABILITY_AVX512)

// [-1, 1] in 32 cells, narrower than codes: a cell holds one midpoint at most, so that its first code and one
// comparison give the code.
constexpr float kCellsPerUnit = 15.99f;
constexpr auto kFirstCodes = [] {
  std::array<int32_t, 32> codes{};
  for (int cell = 0; cell < 32; ++cell) {
    while (kMidpoints.value[codes[cell]] < static_cast<float>(cell) / kCellsPerUnit - 1.0f) ++codes[cell];
  }
  return codes;
}();

inline IntVec codes_of(Vec v) {
  const __m512i cell = _mm512_cvttps_epi32(v * kCellsPerUnit + kCellsPerUnit);
  const __m512i first = _mm512_permutex2var_epi32(_mm512_loadu_si512(kFirstCodes.data()), cell,
                                                  _mm512_loadu_si512(kFirstCodes.data() + 16));
  const __m512 midpoint = _mm512_permutexvar_ps(first, _mm512_loadu_ps(kMidpoints.value));
  return bits_as<IntVec>(first) - (v > bits_as<Vec>(midpoint));
}

#else

inline IntVec codes_of(Vec v) {
  IntVec codes{};
  for (int i = 0; i + 1 < kNf4Codes; ++i) codes -= v > kMidpoints.value[i];
  return codes;
}

#endif

// kLanes bytes of twice as many codes.
inline void store_codes(uint8_t* packed, IntVec first, IntVec second) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i codes =
      _mm256_set_m128i(_mm512_cvtepi32_epi8(bits_as<__m512i>(second)), _mm512_cvtepi32_epi8(bits_as<__m512i>(first)));
  const __m256i bytes = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_cvtepi16_epi8(bytes));
#else
  // Two neighbours are one 64-bit lane, the first its low half.
  for (const IntVec& codes : {first, second}) {
    const PairVec pairs = bits_as<PairVec>(codes);
    const PairBytes bytes = __builtin_convertvector((pairs << 4) | (pairs >> 32), PairBytes);
    std::memcpy(packed, &bytes, sizeof(bytes));
    packed += sizeof(bytes);
  }
#endif
}

// The largest magnitude of n values, n a multiple of kLanes; as integers, so that a NaN is above infinity.
template <typename T>
float absolute_maximum(const T* values, int64_t n) {
  IntVec largest{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const IntVec magnitude = bits_as<IntVec>(load(values + i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  // By vectors of four, for a block may be two vectors long.
  typedef int32_t Four __attribute__((vector_size(16)));
  Four parts[kLanes / 4];
  std::memcpy(parts, &largest, sizeof(largest));
  Four four = parts[0];
  for (const Four& part : parts) four = part > four ? part : four;
  return std::bit_cast<float>(std::max(std::max(four[0], four[1]), std::max(four[2], four[3])));
}

template <typename T>
float quantize_block(const T* values, int64_t n, uint8_t* packed) {
  const float absmax = absolute_maximum(values, n);
  const float inverse = 1.0f / std::max(absmax, kLeastAbsmax);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    store_codes(packed + i / 2, codes_of(load(values + i) * inverse), codes_of(load(values + i + kLanes) * inverse));
  }
  return absmax;
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
    store_codes(bytes + i / 2, codes_of(load(scaled + i) / absmax), codes_of(load(scaled + i + kLanes) / absmax));
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
  dispatch_floating(values.scalar_type(), [&]<typename T>() {
    const T* data = values.const_data_ptr<T>();
    torch::stable::parallel_for(0, whole_blocks, kElementsPerTask / block_size, [=](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * block_size;
        maxima[block] = quantize_block(data + first, block_size, bytes + first / 2);
      }
    });
    if (rest != 0) {
      const int64_t first = whole_blocks * block_size;
      maxima[whole_blocks] = quantize_incomplete_block(data + first, rest, bytes + first / 2);
    }
  });
  return {packed, absmax};
}

inline Vec gather(const float* table, IntVec index) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_i32gather_ps(bits_as<__m512i>(index), table, 4);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_i32gather_ps(table, bits_as<__m256i>(index), 4);
#else
  Vec v;
  for (int64_t lane = 0; lane < kLanes; ++lane) v[lane] = table[index[lane]];
  return v;
#endif
}

// The midpoints between neighbours of the ascending 8-bit code, with a last one that no value is above.
struct NestedMidpoints {
  float value[256];

  explicit NestedMidpoints(const float* code) {
    for (int i = 0; i < 255; ++i) value[i] = (code[i] + code[i + 1]) / 2;
    value[255] = std::numeric_limits<float>::infinity();
  }

  // How many are below each lane.
  IntVec below(Vec v) const {
    IntVec count{};
    for (int half = 128; half > 0; half /= 2) count += (v > gather(value + half - 1, count)) & half;
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
  int32_t counts[kNestedBlock];
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(values + i);
    const IntVec count = midpoints.below(whole ? v * inverse : v / divisor);
    std::memcpy(counts + i, &count, sizeof(count));
  }
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(counts[i]);
  return whole ? largest : divisor;
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax(const Tensor& absmax_in, const Tensor& offset, const Tensor& code_in) {
  const Tensor absmax = as_contiguous(absmax_in), code = as_contiguous(code_in);
  STD_TORCH_CHECK(code.numel() == 256, "nf4_quantize_absmax: code: expected 256 elements, got ", code.numel());
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

// The values of a block's codes, and their lookup.
template <typename T>
class BlockValues {
 public:
  explicit BlockValues(float absmax) {
    for (int64_t i = 0; i < kNf4Codes; i += kLanes) store(values_ + i, load(kValues.value + i) * absmax);
#if defined(CPU_CAPABILITY_AVX512)
    const Vec scaled = load(kValues.value) * absmax;
    if constexpr (std::is_same_v<T, float>) {
      table_ = bits_as<__m512i>(scaled);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      table_ = _mm512_broadcast_i64x4(bits_as<__m256i>(_mm512_cvtneps_pbh(scaled)));
    } else {
      table_ = _mm512_broadcast_i64x4(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
  }

  T operator[](int code) const { return values_[code]; }

  // out[2 i] and out[2 i + 1] of byte i.
  void expand(const uint8_t* packed, T* out, int64_t bytes) const {
    int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
    // A byte goes into both halves of a lane, shifted in the lower; a lookup takes the low bits of its index alone, of
    // 16 floats four, and of 16 values twice over five.
    for (; i + kBytes <= bytes; i += kBytes) {
      __m512i values;
      if constexpr (std::is_same_v<T, float>) {
        const __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(pair, 4), _mm512_slli_epi64(pair, 32));
        values = _mm512_permutexvar_epi32(index, table_);
      } else {
        const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(pair, 4), _mm512_slli_epi32(pair, 16));
        values = _mm512_permutexvar_epi16(index, table_);
      }
      _mm512_storeu_si512(out + 2 * i, values);
    }
#endif
    for (; i < bytes; ++i) {
      out[2 * i] = values_[packed[i] >> 4];
      out[2 * i + 1] = values_[packed[i] & 15];
    }
  }

 private:
  T values_[kNf4Codes];
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int64_t kBytes = 32 / sizeof(T);
  __m512i table_;
#endif
};

// `size` elements from element `first` on, of the whole tensor, by blocks.
template <typename T>
void dequantize_row(const uint8_t* packed, const Nf4Scales& scales, int64_t block_size, int64_t first, int64_t size,
                    T* out) {
  const int64_t last = first + size;
  for (int64_t block = first / block_size; first < last; ++block) {
    const int64_t end = std::min(last, (block + 1) * block_size);
    const BlockValues<T> values(absmax_of(scales, block));
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
  const int64_t rows = out.size(0), columns = out.size(1), out_stride = out.stride(0);
  if (rows == 0 || columns == 0) return;
  const Nf4Storage storage = contiguous_nf4(packed, absmax, nested_absmax, nested_code, offset);
  storage.check(out, block_size, row_size, first_row, first_column);
  const Nf4Scales scales = storage.scales();
  const uint8_t* bytes = storage.packed.const_data_ptr<uint8_t>();
  dispatch_floating(out.scalar_type(), [&]<typename T>() {
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
