#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace memkernels::cuda {

constexpr int kPackBytes = 16;  // the widest load and store of every architecture

template <typename T, int Size>
struct alignas(sizeof(T) * Size) Pack {
  static constexpr int size = Size;
  T value[Size];
};

__device__ __forceinline__ bool is_aligned(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Calls body(pack, column) for packs that cover row[0, cols) once, by the `threads` threads that share the row.
// Packs are 16 bytes on 16-byte boundaries; what lies before the first boundary and after the last one, of which a row
// may start and end anywhere, comes as packs of a single element. The body gets a reference to global memory: one read
// or write of the whole pack is one instruction.
template <typename T, typename Body>
__device__ __forceinline__ void for_each_pack(T* row, int64_t cols, int thread, int threads, Body&& body) {
  constexpr int kSize = kPackBytes / sizeof(T);
  using Vector = std::conditional_t<std::is_const_v<T>, const Pack<std::remove_const_t<T>, kSize>, Pack<T, kSize>>;
  using Scalar = std::conditional_t<std::is_const_v<T>, const Pack<std::remove_const_t<T>, 1>, Pack<T, 1>>;

  const int past_boundary = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kPackBytes / sizeof(T));
  const int64_t to_boundary = past_boundary == 0 ? 0 : kSize - past_boundary;
  const int64_t head = to_boundary < cols ? to_boundary : cols;
  const int64_t packs = (cols - head) / kSize;
  const int64_t tail = head + packs * kSize;

  for (int64_t column = thread; column < head; column += threads) {
    body(*reinterpret_cast<Scalar*>(row + column), column);
  }
  for (int64_t pack = thread; pack < packs; pack += threads) {
    const int64_t column = head + pack * kSize;
    body(*reinterpret_cast<Vector*>(row + column), column);
  }
  for (int64_t column = tail + thread; column < cols; column += threads) {
    body(*reinterpret_cast<Scalar*>(row + column), column);
  }
}

// Calls body(std::integral_constant<int, Size>) with the widest pack that rows of `size` elements at these addresses
// have.
template <typename T, typename Body, typename... Pointers>
void dispatch_pack(int64_t size, Body body, const Pointers*... pointers) {
  constexpr int kWide = kPackBytes / sizeof(T);
  const bool aligned = size % kWide == 0 && ((reinterpret_cast<uintptr_t>(pointers) % kPackBytes == 0) && ...);
  if (aligned) {
    body(std::integral_constant<int, kWide>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

}  // namespace memkernels::cuda
