// The tensors of NF4 storage as operators receive them: checked, and as pointers.
#pragma once

#include <algorithm>
#include <optional>

#include "checks.h"
#include "nf4.h"

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
    check_dtype("packed", packed, ScalarType::Byte);
    check_dtype("absmax", absmax, nested_absmax.has_value() ? ScalarType::Byte : ScalarType::Float);
    const int64_t rows = out.size(0), columns = out.size(1);
    STD_TORCH_CHECK(columns == 1 || out.stride(1) == 1, "out: expected contiguous rows, got stride ", out.stride(1));
    // Divided, for products of what a caller may give can be beyond int64.
    const int64_t held = std::min(2 * packed.numel(), block_size * absmax.numel());
    const bool in_row = first_column >= 0 && first_column <= row_size && columns <= row_size - first_column;
    STD_TORCH_CHECK(in_row && first_row >= 0 && first_column + columns <= held &&
                        first_row <= (held - first_column - columns) / row_size - (rows - 1),
                    "first_row, first_column: expected a place in the weight; ", rows, " rows from ", first_row,
                    " on, ", columns, " columns from ", first_column, " on, in rows of ", row_size,
                    ", are outside of what packed and absmax hold");
    if (!nested_absmax.has_value()) return;
    const int64_t end = (first_row + rows - 1) * row_size + first_column + columns;
    const int64_t blocks = (end + block_size - 1) / block_size;
    check_dtype("nested_absmax", *nested_absmax, ScalarType::Float);
    STD_TORCH_CHECK((blocks + kNestedBlock - 1) / kNestedBlock <= nested_absmax->numel(),
                    "nested_absmax: expected one for ", kNestedBlock, " of ", blocks, " blocks, got ",
                    nested_absmax->numel());
    STD_TORCH_CHECK(nested_code.has_value() && offset.has_value(),
                    "nested_code, offset: expected both with nested_absmax");
    check_tensor("nested_code", *nested_code, ScalarType::Float, {256});
    check_one_element("offset", *offset, ScalarType::Float);
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
