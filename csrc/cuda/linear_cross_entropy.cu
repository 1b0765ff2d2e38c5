// The operators of linear cross-entropy's row kernels on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "../common/checks.h"
#include "../common/cuda_tensors.h"
#include "linear_cross_entropy.cuh"

namespace memkernels::cuda {
namespace {

// A tile whose rows may lie apart, but whose columns are neighbours.
void check_tile(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected [rows, columns], got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, "logits: expected columns of stride 1, got stride ",
                  logits.stride(1));
}

void check_rows(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& logits) {
  check_dtype(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.numel() == logits.size(0) && tensor.is_contiguous(), name, ": expected ", logits.size(0),
                  " contiguous elements, one per row of logits, got ", tensor.numel());
  check_device(name, tensor, logits);
}

void cross_entropy_stats(Tensor logits, Tensor target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                         double softcap, Tensor row_max, Tensor row_sum, Tensor target_logit, Tensor logit_sum) {
  check_tile(logits);
  check_rows("target", target, ScalarType::Long, logits);
  check_rows("row_max", row_max, ScalarType::Float, logits);
  check_rows("row_sum", row_sum, ScalarType::Float, logits);
  check_rows("target_logit", target_logit, ScalarType::Float, logits);
  check_rows("logit_sum", logit_sum, ScalarType::Float, logits);
  const StreamOf stream(logits);
  dispatch_floating("logits", logits, [&]<typename T>() {
    launch_cross_entropy_stats(reinterpret_cast<const DeviceType<T>*>(logits.const_data_ptr<T>()), logits.stride(0),
                               target.const_data_ptr<int64_t>(), logits.size(0), logits.size(1), vocab_start,
                               vocab_size, ignore_index, static_cast<float>(softcap), row_max.mutable_data_ptr<float>(),
                               row_sum.mutable_data_ptr<float>(), target_logit.mutable_data_ptr<float>(),
                               logit_sum.mutable_data_ptr<float>(), stream);
  });
}

void cross_entropy_grad_(Tensor logits, Tensor target, int64_t vocab_start, int64_t vocab_size, Tensor row_max,
                         Tensor row_sum, Tensor grad_loss, int64_t ignore_index, double softcap, double label_smoothing,
                         double z_loss) {
  check_tile(logits);
  check_rows("target", target, ScalarType::Long, logits);
  check_rows("row_max", row_max, ScalarType::Float, logits);
  check_rows("row_sum", row_sum, ScalarType::Float, logits);
  check_rows("grad_loss", grad_loss, ScalarType::Float, logits);
  const StreamOf stream(logits);
  dispatch_floating("logits", logits, [&]<typename T>() {
    launch_cross_entropy_grad(reinterpret_cast<DeviceType<T>*>(logits.mutable_data_ptr<T>()), logits.stride(0),
                              target.const_data_ptr<int64_t>(), logits.size(0), logits.size(1), vocab_start, vocab_size,
                              row_max.const_data_ptr<float>(), row_sum.const_data_ptr<float>(),
                              grad_loss.const_data_ptr<float>(), ignore_index, static_cast<float>(softcap),
                              static_cast<float>(label_smoothing), static_cast<float>(z_loss), stream);
  });
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("cross_entropy_stats", TORCH_BOX(&cross_entropy_stats));
  m.impl("cross_entropy_grad_", TORCH_BOX(&cross_entropy_grad_));
}

}  // namespace
}  // namespace memkernels::cuda
