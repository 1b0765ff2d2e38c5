// Values in blocks of 128 as e4m3 of a float32 scale a block (memkernels/ops/fp8_blocks/reference.py has the formulas).
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/absmax.h"
#include "cpu/bytes.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kBlock = 128, kBlocksPerTask = 256;
constexpr float kLargest = 448.0f, kLeastAbsmax = 1e-30f;
constexpr int32_t kSignBit = 0x80, kMagnitude = 0x7fffffff;
constexpr int32_t kInfinity = 0x7f800000, kInfinityCode = 0x7f;
constexpr int32_t kDroppedBits = 20;                            // of float32's 23 bits of mantissa
constexpr int32_t kBias = (127 - 7) << 3;                       // between the exponents, in units of a code
constexpr int32_t kLeastNormal = (127 - 6) << 23;               // 2^-6, below which codes are multiples of 2^-9
constexpr float kUnitsOfLeast = 16384.0f, kLeast = 1.0f / 512;  // floats from 16384 on are multiples of 2^-9

inline IntVec codes_of(Vec v) {
  const IntVec bits = bits_as<IntVec>(v), magnitude = bits & kMagnitude;
  const IntVec odd = (magnitude >> kDroppedBits) & 1;
  const IntVec normal = ((magnitude + ((1 << (kDroppedBits - 1)) - 1) + odd) >> kDroppedBits) - kBias;
  const IntVec small = bits_as<IntVec>(bits_as<Vec>(magnitude) + kUnitsOfLeast) - std::bit_cast<int32_t>(kUnitsOfLeast);
  return (magnitude < kLeastNormal ? small : normal) | ((bits >> 24) & kSignBit);
}

inline Vec values_of(IntVec codes) {
  const IntVec magnitude = codes & (kSignBit - 1);
  const Vec normal = bits_as<Vec>((magnitude + kBias) << kDroppedBits);
  const Vec small = __builtin_convertvector(magnitude, Vec) * kLeast;
  const IntVec finite = magnitude < 8 ? bits_as<IntVec>(small) : bits_as<IntVec>(normal);
  const IntVec chosen = magnitude == kInfinityCode ? IntVec{} + kInfinity : finite;
  return bits_as<Vec>(chosen | ((codes & kSignBit) << 24));
}

template <typename T>
float encode_block_with_infinities(const T* values, uint8_t* codes);

// Returns the scale.
template <typename T>
float encode_block(const T* values, uint8_t* codes) {
  const float absmax = absolute_maximum(values, kBlock);
  if (absmax == std::numeric_limits<float>::infinity()) return encode_block_with_infinities(values, codes);
  if (!(absmax <= std::numeric_limits<float>::max())) {
    std::fill_n(codes, kBlock, uint8_t{0});
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(absmax, kLeastAbsmax) / kLargest, inverse = 1.0f / scale;
  for (int64_t i = 0; i < kBlock; i += kLanes) store_bytes(codes + i, codes_of(load(values + i) * inverse));
  return scale;
}

template <typename T>
float encode_block_with_infinities(const T* values, uint8_t* codes) {
  float bounded[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    const float value = static_cast<float>(values[i]);
    bounded[i] = (std::bit_cast<int32_t>(value) & kMagnitude) == kInfinity ? 0.0f : value;
  }
  const float scale = encode_block(bounded, codes);
  for (int64_t i = 0; i < kBlock; ++i) {
    const auto bits = std::bit_cast<int32_t>(static_cast<float>(values[i]));
    if ((bits & kMagnitude) == kInfinity) codes[i] = kInfinityCode | ((bits >> 24) & kSignBit);
  }
  return scale;
}

template <typename T>
void decode_block(const uint8_t* codes, float scale, T* values) {
  for (int64_t i = 0; i < kBlock; i += kLanes) store(values + i, values_of(load_bytes(codes + i)) * scale);
}

// Calls body(block, first element, elements) for each block, in parallel.
template <typename Body>
void for_each_block(int64_t size, Body&& body) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      body(block, first, std::min(kBlock, size - first));
    }
  });
}

void check_elements(const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) {
  check_dtype(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.numel() == size && tensor.is_contiguous(), name, ": expected ", size,
                  " contiguous elements, got ", tensor.numel());
}

void check_arguments(const Tensor& values, const Tensor& codes, const Tensor& scales) {
  const int64_t size = values.numel();
  STD_TORCH_CHECK(values.is_contiguous(), "values: expected a contiguous tensor");
  check_elements("codes", codes, ScalarType::Byte, size);
  check_elements("scales", scales, ScalarType::Float, (size + kBlock - 1) / kBlock);
}

void fp8_encode_(const Tensor& values, Tensor codes, Tensor scales) {
  check_arguments(values, codes, scales);
  uint8_t* bytes = codes.mutable_data_ptr<uint8_t>();
  float* of_blocks = scales.mutable_data_ptr<float>();
  dispatch_floating("values", values, [&]<typename T>() {
    const T* data = values.const_data_ptr<T>();
    for_each_block(values.numel(), [&](int64_t block, int64_t first, int64_t count) {
      if (count == kBlock) {
        of_blocks[block] = encode_block(data + first, bytes + first);
        return;
      }
      T padded[kBlock] = {};
      uint8_t padded_codes[kBlock];
      std::copy_n(data + first, count, padded);
      of_blocks[block] = encode_block(padded, padded_codes);
      std::copy_n(padded_codes, count, bytes + first);
    });
  });
}

void fp8_decode_(const Tensor& codes, const Tensor& scales, Tensor values) {
  check_arguments(values, codes, scales);
  const uint8_t* bytes = codes.const_data_ptr<uint8_t>();
  const float* of_blocks = scales.const_data_ptr<float>();
  dispatch_floating("values", values, [&]<typename T>() {
    T* data = values.mutable_data_ptr<T>();
    for_each_block(values.numel(), [&](int64_t block, int64_t first, int64_t count) {
      if (count == kBlock) {
        decode_block(bytes + first, of_blocks[block], data + first);
        return;
      }
      uint8_t padded_codes[kBlock] = {};
      T padded[kBlock];
      std::copy_n(bytes + first, count, padded_codes);
      decode_block(padded_codes, of_blocks[block], padded);
      std::copy_n(padded, count, data + first);
    });
  });
}

MEMKERNELS_CPU_KERNEL(fp8_decode_);
MEMKERNELS_CPU_KERNEL(fp8_encode_);

}  // namespace
}  // namespace memkernels::cpu
