// Gradients of a row op's parameters: sums over all rows, made block of rows by block of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "common/tensors.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// The rows in blocks, and for each block `width` floats of sums. The number of blocks depends on the number of rows
// alone, so that the sums do not depend on the number of threads.
class RowSums {
 public:
  RowSums(int64_t rows, int64_t width)
      : rows_(rows),
        width_(width),
        rows_per_block_(std::max<int64_t>(64, (rows + 63) / 64)),
        blocks_((rows + rows_per_block_ - 1) / rows_per_block_),
        sums_(std::make_unique_for_overwrite<float[]>(blocks_ * width)) {}

  // Calls body(first row, row after the last, the block's sums, zeroed) for each block, in parallel.
  template <typename Body>
  void for_each_block(const Body& body) {
    torch::stable::parallel_for(0, blocks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        float* sums = sums_.get() + block * width_;
        std::fill_n(sums, width_, 0.0f);
        body(block * rows_per_block_, std::min(rows_, (block + 1) * rows_per_block_), sums);
      }
    });
  }

  // Writes out[i], the total of column `first` + i, for i < size.
  template <typename W>
  void write(W* out, int64_t first, int64_t size) const {
    for_each_vec(size, [&](auto at, auto to) {
      Vec total{};
      for (int64_t block = 0; block < blocks_; ++block) {
        total += at(static_cast<const float*>(sums_.get()) + block * width_ + first);
      }
      to(out, total);
    });
  }

 private:
  int64_t rows_, width_, rows_per_block_, blocks_;
  std::unique_ptr<float[]> sums_;
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
