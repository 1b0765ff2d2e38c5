#include "runtime/pinned_slab.h"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/errors.h"

namespace memkernels::runtime {
namespace {

constexpr unsigned kPortable = 1;     // cudaHostRegisterPortable: pinned for every device
constexpr int kMemoryAllocation = 2;  // cudaErrorMemoryAllocation

// Address space without memory, in place of what is at `address` where there is one.
std::byte* reserve(std::byte* address, int64_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address ? MAP_FIXED : 0);
  void* reserved = mmap(address, bytes, PROT_NONE, flags, -1, 0);
  if (reserved == MAP_FAILED)
    throw OutOfMemory("host memory: no address space for " + std::to_string(bytes) + " bytes.");
  madvise(reserved, bytes, MADV_HUGEPAGE);  // fewer faults; where the system has none, nothing changes
  return static_cast<std::byte*>(reserved);
}

int64_t positive(const char* name, int64_t value) {
  if (value <= 0) throw std::invalid_argument(std::string(name) + ": expected a positive number of bytes.");
  return value;
}

}  // namespace

SlabBlock::~SlabBlock() {
  slab_->release(data_, capacity());
}

std::vector<std::span<std::byte>> SlabBlock::registered_parts() const {
  const std::lock_guard lock(slab_->mutex_);
  std::vector<std::span<std::byte>> parts;
  for (const auto step : slab_->steps_) {
    std::byte* begin = std::max(data_, step.data());
    std::byte* end = std::min(data_ + bytes_, step.data() + step.size());
    if (begin < end) parts.emplace_back(begin, end);
  }
  return parts;
}

PinnedSlab::PinnedSlab(int64_t limit, int64_t step, std::shared_ptr<const CudaCalls> cuda)
    : limit_(positive("limit", limit) / kAlignment * kAlignment),
      step_(round_up(positive("step", step), kAlignment)),
      cuda_(std::move(cuda)) {
  if (limit_ == 0) throw std::invalid_argument("limit: expected 4096 bytes at least.");
  base_ = reserve(nullptr, limit_);
}

PinnedSlab::~PinnedSlab() {
  if (cuda_ && getpid() == owner_) {
    for (const auto step : steps_) cuda_->host_unregister(step.data());
  }
  munmap(base_, limit_);
}

std::shared_ptr<SlabBlock> PinnedSlab::allocate(int64_t bytes) {
  const int64_t capacity = round_up(positive("bytes", bytes), kAlignment);
  std::byte* data;
  {
    const std::lock_guard lock(mutex_);
    auto offset = ranges_.allocate(capacity);
    if (!offset) {
      grow(ranges_.missing(capacity));
      offset = ranges_.allocate(capacity);
    }
    data = base_ + *offset;
  }
  return std::make_shared<SlabBlock>(shared_from_this(), data, bytes);
}

void PinnedSlab::grow(int64_t missing) {
  const int64_t room = limit_ - ranges_.size();
  if (missing > room) {
    throw OutOfMemory("host memory: " + std::to_string(missing) + " bytes wanted beyond what is free in one piece, " +
                      std::to_string(room) + " of " + std::to_string(limit_) + " available.");
  }
  const int64_t step = std::min(room, round_up(missing, step_));
  if (mprotect(base_ + ranges_.size(), step, PROT_READ | PROT_WRITE) != 0) {
    throw OutOfMemory("host memory: the system refused " + std::to_string(step) + " bytes.");
  }
  std::byte* data = base_ + ranges_.size();
  if (cuda_) pin(data, step);
  steps_.emplace_back(data, step);
  ranges_.grow(step);
}

void PinnedSlab::pin(std::byte* data, int64_t bytes) {
  const int status = cuda_->host_register(data, bytes, kPortable);
  if (status == kMemoryAllocation) {
    cuda_->get_last_error();
    throw OutOfMemory("host memory: CUDA refused to pin " + std::to_string(bytes) + " bytes beyond " +
                      std::to_string(ranges_.size()) + ", of a limit of " + std::to_string(limit_) + ".");
  }
  cuda_->check(status, "cudaHostRegister");
}

void PinnedSlab::trim() {
  if (getpid() != owner_) return;
  const std::lock_guard lock(mutex_);
  const int64_t reached = ranges_.take_reached();
  while (!steps_.empty() && steps_.back().data() - base_ >= reached) {
    const auto step = steps_.back();
    if (cuda_) cuda_->check(cuda_->host_unregister(step.data()), "cudaHostUnregister");
    steps_.pop_back();
    ranges_.shrink(step.data() - base_);
    reserve(step.data(), step.size());
  }
}

void PinnedSlab::release(const std::byte* data, int64_t capacity) {
  if (getpid() != owner_) return;  // in a forked child the mutex may be held by a thread that is not there
  const std::lock_guard lock(mutex_);
  ranges_.release(data - base_, capacity);
}

RegionStatistics PinnedSlab::statistics() const {
  const std::lock_guard lock(mutex_);
  return ranges_.statistics();
}

}  // namespace memkernels::runtime
