// Marks functions that nvcc compiles for both sides.
#pragma once

#ifdef __CUDACC__
  #define MEMKERNELS_HOST_DEVICE __host__ __device__
#else
  #define MEMKERNELS_HOST_DEVICE
#endif
