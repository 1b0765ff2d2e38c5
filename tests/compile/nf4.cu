// Instantiates every kernel of NF4, for the table of registers and spills.
#include "cuda/nf4.cuh"

#define INSTANTIATE(T)                                                                                                \
  template void memkernels::cuda::launch_nf4_quantize<T>(const T*, int64_t, int64_t, uint8_t*, float*, cudaStream_t); \
  template void memkernels::cuda::launch_nf4_dequantize<T>(const memkernels::cuda::Nf4Rectangle<T>&, cudaStream_t);

INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
