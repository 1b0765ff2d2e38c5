// The tensors of NF4 storage as operators receive them: checked, and as pointers.
#pragma once

#include <optional>

#include "nf4.h"
#include "tensors.h"

namespace memkernels {

inline void check_nf4_block_size(int64_t block_size) {
  STD_TORCH_CHECK(block_size % 32 == 0 && block_size > 0 && block_size <= kNf4MaxBlock,
                  "block_size: expected a multiple of 32 up to 4096, got ", block_size);
}

struct Nf4Storage {
  Tensor packed, absmax;
  std::optional<Tensor> nested_absmax, nested_code, offset;

  // For the rectangle of `out` at (first_row, first_column) of a matrix with rows of row_size.
  void check(const Tensor& out, int64_t block_size, int64_t row_size, int64_t first_row, int64_t first_column) const {
    check_nf4_block_size(block_size);
    const int64_t rows = out.size(0), columns = out.size(1);
    const int64_t end = (first_row + rows - 1) * row_size + first_column + columns;
    const int64_t blocks = (end + block_size - 1) / block_size;
    STD_TORCH_CHECK(columns == 1 || out.stride(1) == 1, "nf4_dequantize_: out must have contiguous rows");
    STD_TORCH_CHECK(first_row >= 0 && first_column >= 0 && first_column + columns <= row_size &&
                        (end + 1) / 2 <= packed.numel() && blocks <= absmax.numel(),
                    "nf4_dequantize_: rows ", first_row, " to ", first_row + rows, ", columns ", first_column, " to ",
                    first_column + columns, " are outside of what packed and absmax hold");
    if (!nested_absmax.has_value()) return;
    STD_TORCH_CHECK((blocks + kNestedBlock - 1) / kNestedBlock <= nested_absmax->numel() && nested_code.has_value() &&
                        nested_code->numel() == 256 && offset.has_value(),
                    "nf4_dequantize_: nested_absmax, nested_code and offset do not fit absmax");
  }

  Nf4Scales scales() const {
    if (!nested_absmax.has_value()) return {.absmax = absmax.const_data_ptr<float>()};
    return {.codes = absmax.const_data_ptr<uint8_t>(),
            .nested_absmax = nested_absmax->const_data_ptr<float>(),
            .nested_code = nested_code->const_data_ptr<float>(),
            .offset = offset->const_data_ptr<float>()};
  }
};

inline Nf4Storage contiguous_nf4(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                                 const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset) {
  return {as_contiguous(packed), as_contiguous(absmax), as_contiguous(nested_absmax), as_contiguous(nested_code),
          offset};
}

}  // namespace memkernels
