// The random words of a matrix: those of Philox at (column / 64 * 16 + column % 16, row, 0, 0), of whose four the
// element has word (column % 64) / 16, so that a vector of counters gives whole vectors of the row.
#pragma once

#include <algorithm>

#include "common/tensors.h"
#include "cpu/philox_vec.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

// Calls body(offset, word) for the vectors of a row of `size` columns, the last of them perhaps incomplete.
template <typename Body>
void for_each_word(uint64_t seed, int64_t row, int64_t size, Body&& body) {
  constexpr int64_t kColumns = 64, kRun = 16;  // columns that a run of counters serves, and the counters of it
  UIntVec lanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<uint32_t>(lane);
  for (int64_t first = 0; first < size; first += kColumns) {
    for (int64_t part = 0; part < kRun; part += kLanes) {
      UIntVec words[4] = {};
      words[0] = lanes + static_cast<uint32_t>(first / kColumns * kRun + part);
      words[1] += static_cast<uint32_t>(row);
      philox(words, seed);
      for (int64_t word = 0; word < 4; ++word) {
        const int64_t offset = first + word * kRun + part;
        if (offset < size) body(offset, words[word]);
      }
    }
  }
}

template <typename T>
Vec load_upto(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_partial(p, count);
}
template <typename T>
void store_upto(T* p, Vec v, int64_t count) {
  count >= kLanes ? store(p, v) : store_partial(p, v, count);
}

template <typename Body>
void for_each_row(int64_t rows, int64_t size, const Body& body) {
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
