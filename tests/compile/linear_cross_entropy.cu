// Instantiates every kernel of linear cross-entropy, for the table of registers and spills.
#include "cuda/linear_cross_entropy.cuh"

#define INSTANTIATE(T)                                                                                                 \
  template void memkernels::cuda::launch_cross_entropy_stats<T>(const T*, int64_t, const int64_t*, int64_t, int64_t,   \
                                                                int64_t, int64_t, int64_t, float, float*, float*,      \
                                                                float*, float*, cudaStream_t);                         \
  template void memkernels::cuda::launch_cross_entropy_grad<T>(T*, int64_t, const int64_t*, int64_t, int64_t, int64_t, \
                                                               int64_t, const float*, const float*, const float*,      \
                                                               int64_t, float, float, float, cudaStream_t);

INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
