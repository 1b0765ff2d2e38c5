// What the host code of CUDA kernels needs of tensors, beyond common/tensors.h: CUDA's dtypes, the current stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "checks.h"

namespace memkernels::cuda {

// CUDA's type for a dtype of `dispatch_floating`; they have the same bits.
template <typename T>
using DeviceType = std::conditional_t<std::is_same_v<T, torch::headeronly::BFloat16>, __nv_bfloat16,
                                      std::conditional_t<std::is_same_v<T, torch::headeronly::Half>, __half, T>>;

#ifdef MEMKERNELS_SIMT

  // Operators on CPU tensors, in a namespace of their own beside the native CPU kernels.
  #define MEMKERNELS_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(memkernels_simt, CPU, m)

struct StreamOf {
  explicit StreamOf(const Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};

#else

  // At file scope of csrc/cuda/<op>.cu: the block that registers its operators.
  #define MEMKERNELS_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(memkernels, CUDA, m)

// Makes the tensor's device current while it lives, and knows that device's current stream.
class StreamOf {
 public:
  explicit StreamOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#endif

}  // namespace memkernels::cuda
