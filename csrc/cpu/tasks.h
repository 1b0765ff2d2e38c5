// Tasks of unequal length over threads, each thread with scratch of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Memory for a thread, aligned to a cache line.
template <typename U>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<U*>(::operator new[](std::max<int64_t>(count, 1) * sizeof(U), kAlign))) {}
  U* get() const { return data_.get(); }
  U& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(U* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<U, Free> data_;
};

// Runs task(scratch, index) for each index, handing them out one by one, in order. Each thread makes its scratch before
// it takes a task: a failed allocation leaves none taken and not done.
template <typename MakeScratch, typename Task>
void parallel_tasks(int64_t count, MakeScratch&& make_scratch, Task&& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t i = next++; i < count; i = next++) task(scratch, i);
  });
}

// The same for tasks without scratch.
template <typename Task>
void parallel_tasks(int64_t count, Task&& task) {
  parallel_tasks(count, [] { return nullptr; }, [&](std::nullptr_t, int64_t i) { task(i); });
}

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
