#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace memkernels::simt {

constexpr int kPoison = 0xFF;  // a NaN in every floating-point format, -1 in integers

// The number of a type of static shared memory, a new one for each call.
inline size_t new_shared_type() {
  static std::atomic<size_t> types{0};
  return types++;
}

// Shared memory of a block, filled with NaN patterns when one starts. Allocated on the heap with its exact size, so
// that AddressSanitizer sees an access past its end.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes) : dynamic_(new std::byte[dynamic_bytes]), dynamic_bytes_(dynamic_bytes) {}

  // Static memory, allocated by the first thread that asks for the type. The others only load an address: an order of
  // all threads would hide their races.
  void* of_type(size_t type, size_t bytes, size_t alignment) {
    std::atomic<void*>& address = static_.at(type);
    if (void* data = address.load(std::memory_order_acquire)) return data;
    std::lock_guard lock(mutex_);
    if (void* data = address.load(std::memory_order_relaxed)) return data;
    regions_.emplace_back(bytes, alignment);
    address.store(regions_.back().data.get(), std::memory_order_release);
    return regions_.back().data.get();
  }

  void* dynamic() { return dynamic_.get(); }

  void poison() {
    for (const Region& region : regions_) std::memset(region.data.get(), kPoison, region.bytes);
    if (dynamic_bytes_ > 0) std::memset(dynamic_.get(), kPoison, dynamic_bytes_);
  }

 private:
  struct Delete {
    std::align_val_t alignment;
    void operator()(void* data) const { ::operator delete(data, alignment); }
  };

  struct Region {
    Region(size_t bytes, size_t alignment)
        : data(::operator new(bytes, std::align_val_t(alignment)), Delete{std::align_val_t(alignment)}), bytes(bytes) {
      std::memset(data.get(), kPoison, bytes);
    }
    std::unique_ptr<void, Delete> data;
    size_t bytes;
  };

  std::array<std::atomic<void*>, 256> static_{};
  std::mutex mutex_;
  std::vector<Region> regions_;
  std::unique_ptr<std::byte[]> dynamic_;
  size_t dynamic_bytes_;
};

}  // namespace memkernels::simt
