// Instantiates the kernels of square_sum, for the table of registers and spills.
#include "cuda/square_sum.cuh"

#define INSTANTIATE(T)                                                                                          \
  template void memkernels::cuda::launch_square_sum<T>(const std::vector<memkernels::cuda::Array<T>>&, double*, \
                                                       cudaStream_t);

INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
