// Instantiates every kernel of AdamW, for the table of registers and spills.
#include "common/adamw.h"
#include "cuda/optimizer.cuh"

template void memkernels::cuda::launch_optimizer_step<true, false>(const memkernels::Group&, const memkernels::AdamW&,
                                                                   cudaStream_t);
