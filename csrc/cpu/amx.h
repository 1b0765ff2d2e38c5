// AMX, the matrix registers of x86 processors: products of tiles of BFloat16, summed in float. In a build without it
// there is nothing but a TileRegisters that does nothing.
#pragma once

#include <cstdint>

#if defined(CPU_CAPABILITY_AMX)
  #include <immintrin.h>
#endif

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AMX)

// While it lives, the tile registers of its thread are shaped for products of BFloat16: 0 to 3 for sums, 4 and 5 for 16
// units of A and of B, 6 and 7 for 8 units.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = tile == 6 ? 32 : 64;
      shapes.rows[tile] = tile == 7 ? 8 : 16;
    }
    asm volatile("" ::"m"(shapes));  // the compiler takes the intrinsic for one that reads 8 bytes
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// 16 rows by `vecs` vectors; strides in bytes.
template <int vecs>
inline void amx_rows(int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c,
                     int64_t c_stride, bool accumulate) {
  // The compiler does not know that the intrinsics read memory.
  asm volatile("" ::: "memory");
  if (accumulate) {
    _tile_loadd(0, c, c_stride);
    if constexpr (vecs > 1) _tile_loadd(1, c + 16, c_stride);
    if constexpr (vecs > 2) _tile_loadd(2, c + 32, c_stride);
    if constexpr (vecs > 3) _tile_loadd(3, c + 48, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (vecs > 1) _tile_zero(1);
    if constexpr (vecs > 2) _tile_zero(2);
    if constexpr (vecs > 3) _tile_zero(3);
  }
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16, b += 4 * b_stride) {
    _tile_loadd(4, a + k, a_stride);
    _tile_loadd(5, b, b_stride);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (vecs > 1) {
      _tile_loadd(5, b + 16, b_stride);
      _tile_dpbf16ps(1, 4, 5);
    }
    if constexpr (vecs > 2) {
      _tile_loadd(5, b + 32, b_stride);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (vecs > 3) {
      _tile_loadd(5, b + 48, b_stride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  if (k < depth) {
    _tile_loadd(6, a + k, a_stride);
    _tile_loadd(7, b, b_stride);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (vecs > 1) {
      _tile_loadd(7, b + 16, b_stride);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (vecs > 2) {
      _tile_loadd(7, b + 32, b_stride);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (vecs > 3) {
      _tile_loadd(7, b + 48, b_stride);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, c, c_stride);
  if constexpr (vecs > 1) _tile_stored(1, c + 16, c_stride);
  if constexpr (vecs > 2) _tile_stored(2, c + 32, c_stride);
  if constexpr (vecs > 3) _tile_stored(3, c + 48, c_stride);
  asm volatile("" ::: "memory");
}

#else

struct TileRegisters {
  TileRegisters() {}
};

#endif

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
