// Compiles and runs CUDA C++ kernels on a CPU, for tests only: with `-I csrc/simt` a kernel's own
// `#include <cuda_runtime.h>` finds this file in place of the toolkit's, and its source is unchanged.
//
// The blocks of a grid run one after another, in an order drawn from MEMKERNELS_SIMT_SEED, and those of a cooperative
// launch all at once; each CUDA thread is a real thread, so ThreadSanitizer checks blocks that run at once for races
// and AddressSanitizer a kernel's own accesses. Shared memory from shared_memory<T>() and dynamic_shared_memory<T>()
// holds NaN bit patterns when a block starts. A failed assert, an exception or a barrier that can never complete ends
// the launch with simt::KernelError.
//
// What it cannot show: races between blocks that run one after another, memory ordering weaker than the host's (a
// shuffle orders the memory of its warp here, on a GPU only __syncwarp does), tensor cores, rounding of approximate
// instructions, and timing.
#pragma once

#define MEMKERNELS_SIMT 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#include <assert.h>
#include <math.h>

#include "atomics.h"
#include "intrinsics.h"
#include "launch.h"
#include "vector_types.h"
