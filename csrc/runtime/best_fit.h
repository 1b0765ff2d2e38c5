// Best-fit allocation of ranges out of a region that grows and shrinks at its end: the smallest free range that is
// large enough, neighbours that are free joined. It knows offsets alone, so that memory and files are divided the same
// way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace memkernels::runtime {

constexpr int64_t kAlignment = 4096;  // of every range: what direct I/O asks of offsets, addresses and sizes

constexpr int64_t round_up(int64_t bytes, int64_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

struct RegionStatistics {
  int64_t size, in_use, peak_in_use, ranges, largest_free;
};

class BestFit {
 public:
  // The offset of `bytes`, a multiple of kAlignment, or nothing where no free range holds them.
  std::optional<int64_t> allocate(int64_t bytes) {
    const auto found = by_size_.lower_bound({bytes, 0});
    if (found == by_size_.end()) return std::nullopt;
    const auto [size, offset] = *found;
    remove(by_offset_.find(offset));
    if (size > bytes) insert(offset + bytes, size - bytes);
    reached_ = std::max(reached_, offset + bytes);
    in_use_ += bytes;
    peak_in_use_ = std::max(peak_in_use_, in_use_);
    ++ranges_;
    return offset;
  }

  void release(int64_t offset, int64_t bytes) {
    in_use_ -= bytes;
    --ranges_;
    insert(offset, bytes);
  }

  void grow(int64_t bytes) {
    insert(size_, bytes);
    size_ += bytes;
  }

  // Takes the end of the region away, which is free from `size` on.
  void shrink(int64_t size) {
    const auto last = std::prev(by_offset_.end());
    const int64_t offset = last->first;
    remove(last);
    if (offset < size) insert(offset, size - offset);
    size_ = size;
  }

  // What the region must grow by to hold `bytes` more in one range.
  int64_t missing(int64_t bytes) const { return bytes - (size_ - end_in_use()); }

  int64_t size() const { return size_; }

  // Where the last range in use ended, at most, since this was asked last.
  int64_t take_reached() { return std::exchange(reached_, end_in_use()); }

  RegionStatistics statistics() const {
    return {size_, in_use_, peak_in_use_, ranges_, by_size_.empty() ? 0 : by_size_.rbegin()->first};
  }

 private:
  using ByOffset = std::map<int64_t, int64_t>;

  int64_t end_in_use() const {
    if (by_offset_.empty()) return size_;
    const auto [offset, size] = *by_offset_.rbegin();
    return offset + size == size_ ? offset : size_;
  }

  void insert(int64_t offset, int64_t bytes) {
    const auto after = by_offset_.lower_bound(offset);
    if (after != by_offset_.end() && offset + bytes == after->first) {
      bytes += after->second;
      remove(after);
    }
    const auto next = by_offset_.lower_bound(offset);
    if (next != by_offset_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        offset = before->first;
        bytes += before->second;
        remove(before);
      }
    }
    by_offset_.emplace(offset, bytes);
    by_size_.emplace(bytes, offset);
  }

  void remove(ByOffset::const_iterator range) {
    by_size_.erase({range->second, range->first});
    by_offset_.erase(range);
  }

  ByOffset by_offset_;
  std::set<std::pair<int64_t, int64_t>> by_size_;
  int64_t size_ = 0, in_use_ = 0, peak_in_use_ = 0, reached_ = 0, ranges_ = 0;
};

}  // namespace memkernels::runtime
