// csrc/cuda/nf4.cuh against plain loops, bit for bit.
#include "cuda/nf4.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "check.h"

using namespace memkernels;
using namespace memkernels::cuda;

constexpr float kCanary = 12345.0f;
constexpr uint8_t kByteCanary = 0xA5;

template <typename T>
bool operator!=(T a, T b)
  requires(sizeof(T) == 2)
{
  return a.bits != b.bits;
}

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

int code_of(float v) {
  const Nf4Table midpoints = nf4_midpoints();
  int code = 0;
  for (int i = 0; i + 1 < kNf4Codes; ++i) code += v > midpoints.value[i];
  return code;
}

struct Stored {
  std::vector<int> codes;
  std::vector<float> absmax;
};

Stored quantize(const std::vector<float>& values, int64_t block_size) {
  const int64_t n = values.size();
  Stored stored;
  for (int64_t first = 0; first < n; first += block_size) {
    const int64_t last = std::min(n, first + block_size);
    const bool whole = last == first + block_size;
    float absmax = 0.0f;
    for (int64_t i = first; i < last; ++i) {
      const float magnitude = std::abs(values[i]);
      if (magnitude > absmax || std::isnan(magnitude)) absmax = std::isnan(absmax) ? absmax : magnitude;
    }
    const float divisor = absmax < kLeastAbsmax ? kLeastAbsmax : absmax;
    const float inverse = 1.0f / divisor;
    for (int64_t i = first; i < last; ++i) {
      stored.codes.push_back(code_of(whole ? values[i] * inverse : values[i] / divisor));
    }
    stored.absmax.push_back(whole ? absmax : divisor);
  }
  return stored;
}

template <typename T>
void test_quantize(const std::string& type, int64_t n, int64_t block_size, int64_t offset, bool special = false) {
  const std::string name = type + ", " + std::to_string(n) + " in blocks of " + std::to_string(block_size);
  Random random(n + block_size);
  Guarded<T> input(n, offset, from_float<T>(kCanary));
  std::vector<float> values;
  for (int64_t i = 0; i < n; ++i) {
    const float scale = i / block_size == 1 ? 0.0f : 1.0f + static_cast<float>(i / block_size);
    input[i] = from_float<T>(scale * static_cast<float>(random()));
    if (special && i == 2 * block_size + 5) input[i] = from_float<T>(NAN);
    if (special && i == 3 * block_size + 1) input[i] = from_float<T>(-INFINITY);
    values.push_back(to_float(input[i]));
  }
  const Stored wanted = quantize(values, block_size);
  const int64_t blocks = wanted.absmax.size();
  Guarded<uint8_t> packed((n + 1) / 2, 0, kByteCanary);
  Guarded<float> absmax(blocks, 1, kCanary);
  launch_nf4_quantize<T>(input.data(), n, block_size, packed.data(), absmax.data(), nullptr);

  expect(input.intact() && packed.intact() && absmax.intact(), name + ": canaries");
  for (int64_t block = 0; block < blocks; ++block) {
    const bool nan = std::isnan(wanted.absmax[block]) && std::isnan(absmax[block]);
    if (!expect(nan || same_bits(absmax[block], wanted.absmax[block]), name + ": absmax")) return;
  }
  for (int64_t i = 0; i < n + n % 2; ++i) {
    const int code = packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
    // Beyond an odd number of values comes the code of 0.
    if (!expect(code == (i < n ? wanted.codes[i] : 7), name + ": code " + std::to_string(i))) return;
  }
}

// Every value that lies on a midpoint, or next to one.
void test_ties() {
  const Nf4Table midpoints = nf4_midpoints(), code_values = nf4_values();
  std::vector<float> values = {1.0f};
  for (int i = 0; i < kNf4Codes; ++i) {
    if (i + 1 < kNf4Codes) {
      values.insert(values.end(), {midpoints.value[i], std::nextafter(midpoints.value[i], 2.0f),
                                   std::nextafter(midpoints.value[i], -2.0f)});
    }
    values.push_back(code_values.value[i]);
  }
  values.resize(64);
  std::vector<uint8_t> packed(32);
  float absmax = 0.0f;
  launch_nf4_quantize<float>(values.data(), 64, 64, packed.data(), &absmax, nullptr);
  const Stored wanted = quantize(values, 64);
  for (int64_t i = 0; i < 64; ++i) {
    expect((packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15) == wanted.codes[i], "tie " + std::to_string(i));
  }
}

struct Rectangle {
  std::string name;
  int64_t matrix_rows, row_size, first_row, first_column, rows, columns;
  int64_t block_size = 64;
  bool nested = false;
  int64_t padding = 0;  // of a row of out, in elements
  int64_t offset = 0;   // of its first, in elements past a 16-byte boundary
};

struct Storage {
  std::vector<uint8_t> packed, codes;
  std::vector<float> absmax, nested_absmax, nested_code;
  float offset = 0.1f;

  Storage(int64_t n, int64_t block_size) {
    Random random(n);
    const auto byte = [&] { return static_cast<uint8_t>(128 + 127.9 * random()); };
    packed.resize((n + 1) / 2);
    std::generate(packed.begin(), packed.end(), byte);
    const int64_t blocks = (n + block_size - 1) / block_size;
    codes.resize(blocks);
    std::generate(codes.begin(), codes.end(), byte);
    const auto real = [&] { return static_cast<float>(random()); };
    absmax.resize(blocks);
    std::generate(absmax.begin(), absmax.end(), real);
    nested_absmax.resize((blocks + kNestedBlock - 1) / kNestedBlock);
    std::generate(nested_absmax.begin(), nested_absmax.end(), real);
    nested_code.resize(256);
    std::generate(nested_code.begin(), nested_code.end(), real);
  }

  Nf4Scales scales(bool nested) const {
    if (!nested) return {.absmax = absmax.data()};
    return {.codes = codes.data(),
            .nested_absmax = nested_absmax.data(),
            .nested_code = nested_code.data(),
            .offset = &offset};
  }

  float absmax_of(bool nested, int64_t block) const {
    if (!nested) return absmax[block];
    volatile float product = nested_code[codes[block]] * nested_absmax[block / 256];
    return product + offset;
  }
};

template <typename T>
void test_dequantize(const std::string& type, const Rectangle& r) {
  const std::string name = type + ", " + r.name;
  const Storage storage(r.matrix_rows * r.row_size, r.block_size);
  const int64_t stride = r.columns + r.padding;
  const T canary = from_float<T>(kCanary);
  Guarded<T> out(r.rows * stride, r.offset, canary);
  launch_nf4_dequantize<T>({.out = out.data(),
                            .rows = r.rows,
                            .columns = r.columns,
                            .out_stride = stride,
                            .packed = storage.packed.data(),
                            .scales = storage.scales(r.nested),
                            .block_size = static_cast<int>(r.block_size),
                            .row_size = r.row_size,
                            .first_row = r.first_row,
                            .first_column = r.first_column},
                           nullptr);
  expect(out.intact(), name + ": canaries");
  for (int64_t row = 0; row < r.rows; ++row) {
    for (int64_t column = 0; column < stride; ++column) {
      const int64_t i = (r.first_row + row) * r.row_size + r.first_column + column;
      T wanted = canary;
      if (column < r.columns) {
        const int code = storage.packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
        wanted = from_float<T>(nf4_values().value[code] * storage.absmax_of(r.nested, i / r.block_size));
      }
      const std::string where = ": row " + std::to_string(row) + ", column " + std::to_string(column);
      if (!expect(same_bits(out[row * stride + column], wanted), name + where)) return;
    }
  }
}

std::vector<Rectangle> rectangles() {
  return {
      {"one element", 1, 1, 0, 0, 1, 1},
      {"whole, rows of 96", 9, 96, 0, 0, 9, 96, 32},
      {"rows longer than a piece", 3, 2176, 0, 0, 3, 2176, 64, true},
      {"rows of two whole pieces", 2, 2048, 1, 0, 1, 2048, 4096, true},
      {"a tile of columns", 20, 512, 0, 128, 20, 256, 64, true},
      {"a tile of columns that is no multiple of 8", 5, 512, 2, 64, 3, 101, 128, false, 3},
      {"odd first element", 6, 75, 1, 3, 4, 70, 64, true, 2, 1},
      {"odd row size", 40, 63, 3, 0, 37, 63, 32, false},
      {"an odd address", 4, 128, 0, 0, 4, 128, 64, false, 8, 1},
      {"an odd stride", 4, 128, 0, 0, 4, 128, 64, true, 1},
      {"blocks of 96", 3, 200, 0, 0, 3, 200, 96, true},
      {"more than 256 blocks", 70, 256, 0, 0, 70, 256, 32, true},
      {"a row of 8 bytes", 4, 16, 1, 8, 3, 8, 32},
  };
}

void test_offsets_beyond_32_bits() {
  constexpr int64_t kRowSize = (int64_t{1} << 32) + 64, kBlock = 4096;
  const auto reserve = [](size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  const size_t packed_bytes = kRowSize, out_bytes = (kRowSize + 64) * sizeof(__half);
  auto* packed = static_cast<uint8_t*>(reserve(packed_bytes));
  auto* out = static_cast<__half*>(reserve(out_bytes));
  if (!expect(packed != MAP_FAILED && out != MAP_FAILED, "13 GiB of address space")) return;
  const std::vector<float> absmax(2 * kRowSize / kBlock + 1, 2.0f);
  // Two rows of 9 columns, in the matrix and in out.
  for (int64_t row = 0; row < 2; ++row) std::fill_n(packed + row * (kRowSize / 2), 5, uint8_t{0xF0});
  const Nf4Rectangle<__half> rectangle = {.out = out,
                                          .rows = 2,
                                          .columns = 9,
                                          .out_stride = kRowSize,
                                          .packed = packed,
                                          .scales = {.absmax = absmax.data()},
                                          .block_size = kBlock,
                                          .row_size = kRowSize,
                                          .first_row = 0,
                                          .first_column = 0};
  launch_nf4_dequantize(rectangle, nullptr);
  for (int64_t i = 0; i < 9; ++i) {
    const float wanted = i % 2 == 0 ? 2.0f : -2.0f;
    expect(to_float(out[i]) == wanted && to_float(out[kRowSize + i]) == wanted, "a row 2^32 elements away");
  }
  munmap(packed, packed_bytes);
  munmap(out, out_bytes);
}

void test_nothing() {
  launch_nf4_quantize<float>(nullptr, 0, 64, nullptr, nullptr, nullptr);
  launch_nf4_dequantize<float>({}, nullptr);
}

template <typename T>
void test(const std::string& type) {
  for (int64_t block_size : {32, 64, 96, 256, 288, 1024, 1056, 4096}) {
    test_quantize<T>(type, 3 * block_size, block_size, 0);
    test_quantize<T>(type, 2 * block_size + 13, block_size, 1);
  }
  test_quantize<T>(type, 1, 64, 0);
  test_quantize<T>(type, 40 * 64 + 50, 64, 0, true);
  for (const Rectangle& rectangle : rectangles()) test_dequantize<T>(type, rectangle);
}

// Arguments: the dtypes to test.
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string type = argv[i];
    if (type == "float32") test<float>(type);
    if (type == "float16") test<__half>(type);
    if (type == "bfloat16") test<__nv_bfloat16>(type);
  }
  test_ties();
  test_nothing();
  test_offsets_beyond_32_bits();
  return failures > 0;
}
