#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "error.h"

namespace memkernels::simt {

// Counts the threads of a block that can still run. When none can and not all have left, every one of them waits for
// another: a deadlock, found at once instead of by a timeout. All accesses are relaxed, so that this count orders no
// memory and hides no race from ThreadSanitizer.
class Progress {
 public:
  void reset(uint32_t threads) {
    threads_ = threads;
    state_.store(threads, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    message_.clear();
  }

  // One thread starts to wait. True when that leaves nobody to wake it.
  bool stop() { return stalled(state_.fetch_sub(1, std::memory_order_relaxed) - 1); }
  void resume(uint32_t count) { state_.fetch_add(count, std::memory_order_relaxed); }
  // One thread has left the kernel. True when all that remain wait for each other.
  bool leave() { return stalled(state_.fetch_add(kLeft - 1, std::memory_order_relaxed) + kLeft - 1); }

  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  void fail(const std::string& message) {
    std::lock_guard lock(mutex_);
    if (!failed()) message_ = message;
    failed_.store(true, std::memory_order_relaxed);
  }
  // Read once the threads have stopped.
  const std::string& message() const { return message_; }

 private:
  static constexpr uint64_t kLeft = uint64_t{1} << 32;  // high half: threads that left; low half: threads that can run

  bool stalled(uint64_t state) const { return state % kLeft == 0 && state / kLeft < threads_; }

  uint32_t threads_ = 0;
  std::atomic<uint64_t> state_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::string message_;
};

}  // namespace memkernels::simt
