// The operators of NF4 storage on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_tensors.h"
#include "../common/nf4_tensors.h"
#include "nf4.cuh"

namespace memkernels::cuda {
namespace {

std::tuple<Tensor, Tensor> nf4_quantize(Tensor values_in, int64_t block_size) {
  check_nf4_block_size(block_size);
  const Tensor values = as_contiguous(values_in);
  const int64_t n = values.numel();
  Tensor packed = torch::stable::new_empty(values, {(n + 1) / 2}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(values, {(n + block_size - 1) / block_size}, ScalarType::Float);
  const StreamOf stream(values);
  dispatch_floating("values", values, [&]<typename T>() {
    launch_nf4_quantize(reinterpret_cast<const DeviceType<T>*>(values.const_data_ptr<T>()), n, block_size,
                        packed.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>(), stream);
  });
  return {packed, absmax};
}

void nf4_dequantize_(Tensor out, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                     std::optional<Tensor> nested_code, std::optional<Tensor> offset, int64_t block_size,
                     int64_t row_size, int64_t first_row, int64_t first_column) {
  check_dim("out", out, 2);
  check_device("packed", packed, out);
  check_device("absmax", absmax, out);
  check_device("nested_absmax", nested_absmax, out);
  check_device("nested_code", nested_code, out);
  check_device("offset", offset, out);
  if (out.numel() == 0) return;
  const Nf4Storage storage = contiguous_nf4(packed, absmax, nested_absmax, nested_code, offset);
  storage.check(out, block_size, row_size, first_row, first_column);
  const StreamOf stream(out);
  dispatch_floating("out", out, [&]<typename T>() {
    const Nf4Rectangle<DeviceType<T>> rectangle = {
        .out = reinterpret_cast<DeviceType<T>*>(out.mutable_data_ptr<T>()),
        .rows = out.size(0),
        .columns = out.size(1),
        .out_stride = out.stride(0),
        .packed = storage.packed.const_data_ptr<uint8_t>(),
        .scales = storage.scales(),
        .block_size = static_cast<int>(block_size),
        .row_size = row_size,
        .first_row = first_row,
        .first_column = first_column,
    };
    launch_nf4_dequantize(rectangle, stream);
  });
}

MEMKERNELS_CUDA_OPERATORS(m) {
  m.impl("nf4_dequantize_", TORCH_BOX(&nf4_dequantize_));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
}

}  // namespace
}  // namespace memkernels::cuda
