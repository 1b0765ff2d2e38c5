// Kernels that break the rules in one way each, chosen by the argument; a sanitizer has to say so.
#include <cstring>

#include "check.h"
#include "common/cuda_launch.cuh"
#include "common/cuda_pack.cuh"
#include "common/cuda_shared.cuh"

using namespace memkernels::cuda;

__global__ void write_global(float* output, int64_t index) {
  output[index + threadIdx.x] = 1.0f;
}

__global__ void write_static_shared(float* output, int64_t index) {
  struct Row {
    float value[32];
  };
  float* row = shared_memory<Row>().value;
  row[index + threadIdx.x] = 1.0f;
  output[0] = row[0];
}

__global__ void write_dynamic_shared(float* output, int64_t index) {
  dynamic_shared_memory<float>()[index + threadIdx.x] = 1.0f;
  output[0] = 1.0f;
}

__global__ void read_misaligned(float* output, int64_t index) {
  const auto pack = *reinterpret_cast<const Pack<float, 4>*>(output + index);
  output[0] = pack.value[3];
}

int main(int, char** argv) {
  const std::string name = argv[1];
  const auto kernel = name == "global"           ? write_global
                      : name == "static_shared"  ? write_static_shared
                      : name == "dynamic_shared" ? write_dynamic_shared
                                                 : read_misaligned;
  const int64_t index = name == "misaligned" ? 1 : 32;
  std::vector<float> output(32);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(1);
  config.dynamicSmemBytes = 32 * sizeof(float);
  cudaLaunchKernelEx(&config, kernel, output.data(), index);
  return 0;
}
