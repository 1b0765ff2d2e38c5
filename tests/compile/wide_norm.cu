// Instantiates every kernel of RMS norm and layer norm over wide rows, for the table of registers and spills.
#include "cuda/wide_norm.cuh"

using namespace memkernels::cuda;

#define INSTANTIATE(T)                                                                                         \
  template void memkernels::cuda::launch_wide_norm_fwd<T>(const WideNormFwd<T>&, bool, int64_t, cudaStream_t); \
  template void memkernels::cuda::launch_wide_norm_bwd<T>(const WideNormBwd<T>&, bool, int64_t, cudaStream_t);

INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
