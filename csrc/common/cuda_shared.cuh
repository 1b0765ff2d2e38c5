#pragma once

#include <cuda_runtime.h>

namespace memkernels::cuda {

// Static shared memory of the block, one T per type: calls with the same T return the same memory.
template <typename T>
__device__ T& shared_memory() {
#ifdef MEMKERNELS_SIMT
  static const size_t type = simt::new_shared_type();
  return *static_cast<T*>(simt::current_block->shared().of_type(type, sizeof(T), alignof(T)));
#else
  __shared__ T storage;
  return storage;
#endif
}

// The dynamicSmemBytes of the launch, aligned to 16 bytes.
template <typename T>
__device__ T* dynamic_shared_memory() {
#ifdef MEMKERNELS_SIMT
  return static_cast<T*>(simt::current_block->shared().dynamic());
#else
  extern __shared__ __align__(16) unsigned char memkernels_dynamic_shared[];
  return reinterpret_cast<T*>(memkernels_dynamic_shared);
#endif
}

}  // namespace memkernels::cuda
