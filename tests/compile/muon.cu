// Instantiates every kernel of Muon, for the table of registers and spills.
#include "cuda/muon.cuh"

template void memkernels::cuda::launch_muon_momentum<float>(const memkernels::Group&, double, bool, cudaStream_t);
template void memkernels::cuda::launch_muon_momentum<uint16_t>(const memkernels::Group&, double, bool, cudaStream_t);
