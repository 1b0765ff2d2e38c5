#include "runtime/crc32c.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
  #include <nmmintrin.h>
#endif

namespace memkernels::runtime {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78, kAllOnes = 0xffffffff;  // bits in reverse, lowest power first
static_assert(std::endian::native == std::endian::little, "words are read with their first byte lowest");

uint64_t load_word(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// tables[k][b]: what byte b leaves behind after k more bytes of zero.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t portable(const uint8_t* data, size_t bytes) {
  uint32_t crc = kAllOnes;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    const uint64_t word = load_word(data) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; bytes > 0; --bytes, ++data) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xff];
  return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t hardware(const uint8_t* data, size_t bytes) {
  uint64_t crc = kAllOnes;
  for (; bytes >= 8; bytes -= 8, data += 8) crc = _mm_crc32_u64(crc, load_word(data));
  for (; bytes > 0; --bytes, ++data) crc = _mm_crc32_u8(static_cast<uint32_t>(crc), *data);
  return ~static_cast<uint32_t>(crc);
}

// Three blocks at a time: the instruction's result takes three cycles, and one starts each cycle.
__attribute__((target("sse4.2"))) void hardware_blocks(const uint8_t* data, size_t bytes, size_t block,
                                                       uint32_t* checksums) {
  size_t first = 0;
  for (; first + 3 * block <= bytes; first += 3 * block) {
    const uint8_t* p = data + first;
    uint64_t a = kAllOnes, b = kAllOnes, c = kAllOnes;
    for (const uint8_t* end = p + block; p < end; p += 8) {
      a = _mm_crc32_u64(a, load_word(p));
      b = _mm_crc32_u64(b, load_word(p + block));
      c = _mm_crc32_u64(c, load_word(p + 2 * block));
    }
    for (const uint64_t crc : {a, b, c}) *checksums++ = ~static_cast<uint32_t>(crc);
  }
  for (; first < bytes; first += block) *checksums++ = hardware(data + first, std::min(block, bytes - first));
}
#endif

}  // namespace

void crc32c_blocks_portable(const uint8_t* data, size_t bytes, size_t block, uint32_t* checksums) {
  for (size_t first = 0; first < bytes; first += block) {
    *checksums++ = portable(data + first, std::min(block, bytes - first));
  }
}

void crc32c_blocks(const uint8_t* data, size_t bytes, size_t block, uint32_t* checksums) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return hardware_blocks(data, bytes, block, checksums);
#endif
  crc32c_blocks_portable(data, bytes, block, checksums);
}

}  // namespace memkernels::runtime
