// Instantiates every kernel of Lion, for the table of registers and spills.
#include "common/lion.h"
#include "cuda/optimizer.cuh"

template void memkernels::cuda::launch_optimizer_step<true>(const memkernels::Group&, const memkernels::Lion&,
                                                            cudaStream_t);
