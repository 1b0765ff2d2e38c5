#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <thread>

#include "rendezvous.h"
#include "shared_memory.h"
#include "vector_types.h"

inline thread_local uint3 threadIdx;
inline thread_local uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;
constexpr int warpSize = memkernels::simt::kWarpSize;

namespace memkernels::simt {

// What the blocks of a launch have in common.
struct Launch {
  std::atomic<bool> failed{false};
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
};

// A block that runs now: its barriers, its shared memory and its failure, if any.
class Block {
 public:
  Block(int threads, size_t dynamic_bytes, Launch& launch)
      : threads_(threads), launch_(launch), shared_(dynamic_bytes), barrier_(progress_) {
    for (int first = 0; first < threads; first += kWarpSize) warps_.emplace_back(progress_);
  }

  void reset() {
    shared_.poison();
    progress_.reset(threads_);
    barrier_.reset(threads_);
    for (int warp = 0; warp < static_cast<int>(warps_.size()); ++warp) {
      warps_[warp].reset(std::min(kWarpSize, threads_ - warp * kWarpSize));
    }
  }

  SharedMemory& shared() { return shared_; }

  // Called again and again by a thread that waits for another block.
  void sleep() {
    if (failed()) throw Aborted{};
    if (launch_.failed.load(std::memory_order_relaxed)) throw OtherBlockFailed{};
    if (std::chrono::steady_clock::now() > launch_.start + std::chrono::seconds(kPatience)) {
      throw std::logic_error("waits for another block in vain");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(500));  // spinning would keep the other block from running
  }

  void synchronize() { barrier_.wait(); }
  Lanes exchange(uint32_t mask, int thread, uint64_t value) {
    return warps_[thread / kWarpSize].exchange(mask, thread % kWarpSize, value);
  }

  // Runs the kernel's body for one thread; nothing escapes.
  void run(int thread, const std::function<void()>& body) {
    try {
      body();
      barrier_.leave();
      warps_[thread / kWarpSize].leave(thread % kWarpSize);
      if (progress_.leave()) throw Deadlock{};
    } catch (const Aborted&) {
    } catch (const OtherBlockFailed&) {
      stop("");
    } catch (const Deadlock&) {
      fail("deadlock: every remaining thread waits at a __syncthreads or warp intrinsic that others never reach");
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }

  bool failed() const { return progress_.failed(); }
  const std::string& message() const { return progress_.message(); }

 private:
  static std::string describe(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
  }

  void fail(const std::string& what) {
    stop("block " + describe(blockIdx) + ", thread " + describe(threadIdx) + ": " + what);
  }

  void stop(const std::string& message) {
    progress_.fail(message);
    launch_.failed.store(true, std::memory_order_relaxed);
    barrier_.wake();
    for (Warp& warp : warps_) warp.wake();
  }

  static constexpr int kPatience = 200;  // seconds

  int threads_;
  Launch& launch_;
  SharedMemory shared_;
  Progress progress_;
  BlockBarrier barrier_;
  std::deque<Warp> warps_;  // a deque: a warp holds a mutex and cannot move
};

inline thread_local Block* current_block = nullptr;
inline thread_local int current_thread = 0;

}  // namespace memkernels::simt
