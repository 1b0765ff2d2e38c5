// Instantiates every kernel of the dispatch to experts, for the table of registers and spills.
#include "cuda/moe.cuh"

using namespace memkernels::cuda;

#define INSTANTIATE_PLAN(Id)                                                                                   \
  template void memkernels::cuda::launch_moe_plan<Id>(const Id*, int64_t, int64_t, int64_t, int64_t, int32_t*, \
                                                      int32_t*, int32_t*, int32_t*, int32_t*, cudaStream_t);
#define INSTANTIATE(T)                                                                                             \
  template void memkernels::cuda::launch_moe_dispatch<T>(MoeRows, const T*, const float*, T*, cudaStream_t);       \
  template void memkernels::cuda::launch_moe_combine<T>(MoeRows, const T*, const float*, T*, cudaStream_t);        \
  template void memkernels::cuda::launch_moe_combine_bwd<T>(MoeRows, const T*, const T*, const float*, T*, float*, \
                                                            cudaStream_t);

INSTANTIATE_PLAN(int32_t)
INSTANTIATE_PLAN(int64_t)
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
