// Instantiates every kernel of SGD, with momentum and without, for the table of registers and spills.
#include "common/sgd.h"
#include "cuda/optimizer.cuh"

template void memkernels::cuda::launch_optimizer_step<true>(const memkernels::Group&, const memkernels::SGD&,
                                                            cudaStream_t);
template void memkernels::cuda::launch_optimizer_step<>(const memkernels::Group&, const memkernels::SGD&, cudaStream_t);
