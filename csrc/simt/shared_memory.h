#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace memkernels::simt {

constexpr int kPoison = 0xFF;  // a NaN in every floating-point format, -1 in integers

// All shared memory of the program, filled with NaN patterns before each block. Allocated on the heap with its exact
// size, so that AddressSanitizer sees an access past its end.
class SharedMemory {
 public:
  static SharedMemory& instance() {
    static SharedMemory memory;
    return memory;
  }

  void* allocate(size_t bytes, size_t alignment) {
    std::lock_guard lock(mutex_);
    void* data = ::operator new(bytes, std::align_val_t(alignment));
    std::memset(data, kPoison, bytes);
    static_.push_back({data, bytes});
    return data;
  }

  void resize_dynamic(size_t bytes) {
    dynamic_.reset(new std::byte[bytes]);
    dynamic_bytes_ = bytes;
  }
  void* dynamic() { return dynamic_.get(); }

  void poison() {
    for (const Region& region : static_) std::memset(region.data, kPoison, region.bytes);
    if (dynamic_bytes_ > 0) std::memset(dynamic_.get(), kPoison, dynamic_bytes_);
  }

 private:
  struct Region {
    void* data;
    size_t bytes;
  };

  std::mutex mutex_;
  std::vector<Region> static_;  // reachable until the process ends, as the kernels' own statics are
  std::unique_ptr<std::byte[]> dynamic_;
  size_t dynamic_bytes_ = 0;
};

}  // namespace memkernels::simt
