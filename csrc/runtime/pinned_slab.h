// One region of page-aligned host memory, divided by best fit. Address space for `limit` bytes is reserved at once,
// memory is taken in steps, so that the region grows in place and an address stays valid. With CUDA each step is
// registered with it once. Steps at the end that are free may go back to the system.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/best_fit.h"
#include "runtime/cuda_calls.h"

namespace memkernels::runtime {

class PinnedSlab;

// A range of a slab; it returns to the slab with the last who holds it.
class SlabBlock {
 public:
  SlabBlock(std::shared_ptr<PinnedSlab> slab, std::byte* data, int64_t bytes)
      : slab_(std::move(slab)), data_(data), bytes_(bytes) {}
  ~SlabBlock();
  SlabBlock(const SlabBlock&) = delete;
  SlabBlock& operator=(const SlabBlock&) = delete;

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  int64_t capacity() const { return round_up(bytes_, kAlignment); }
  // The block in as many parts as it touches steps: CUDA is given no range of two registrations.
  std::vector<std::span<std::byte>> registered_parts() const;

 private:
  std::shared_ptr<PinnedSlab> slab_;
  std::byte* data_;
  int64_t bytes_;
};

class PinnedSlab : public std::enable_shared_from_this<PinnedSlab> {
 public:
  PinnedSlab(int64_t limit, int64_t step, std::shared_ptr<const CudaCalls> cuda);
  ~PinnedSlab();
  PinnedSlab(const PinnedSlab&) = delete;
  PinnedSlab& operator=(const PinnedSlab&) = delete;

  std::shared_ptr<SlabBlock> allocate(int64_t bytes);
  // Gives back the steps at the end that nothing was in since this was called last.
  void trim();
  RegionStatistics statistics() const;
  int64_t limit() const { return limit_; }

 private:
  friend class SlabBlock;
  void grow(int64_t missing);
  void pin(std::byte* data, int64_t bytes);
  void release(const std::byte* data, int64_t capacity);

  const int64_t limit_, step_;
  const std::shared_ptr<const CudaCalls> cuda_;
  const pid_t owner_ = getpid();
  std::byte* base_;
  mutable std::mutex mutex_;
  BestFit ranges_;
  std::vector<std::span<std::byte>> steps_;
};

}  // namespace memkernels::runtime
