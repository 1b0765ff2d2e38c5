#pragma once

#include <algorithm>
#include <deque>
#include <functional>

#include "rendezvous.h"
#include "vector_types.h"

inline thread_local uint3 threadIdx;
inline thread_local uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;
constexpr int warpSize = memkernels::simt::kWarpSize;

namespace memkernels::simt {

// The block that runs now: its barriers and its failure, if any.
class Block {
 public:
  explicit Block(int threads) : threads_(threads), barrier_(progress_) {
    for (int first = 0; first < threads; first += kWarpSize) warps_.emplace_back(progress_);
  }

  void reset() {
    progress_.reset(threads_);
    barrier_.reset(threads_);
    for (int warp = 0; warp < static_cast<int>(warps_.size()); ++warp) {
      warps_[warp].reset(std::min(kWarpSize, threads_ - warp * kWarpSize));
    }
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
    progress_.fail("block " + describe(blockIdx) + ", thread " + describe(threadIdx) + ": " + what);
    barrier_.wake();
    for (Warp& warp : warps_) warp.wake();
  }

  int threads_;
  Progress progress_;
  BlockBarrier barrier_;
  std::deque<Warp> warps_;  // a deque: a warp holds a mutex and cannot move
};

inline thread_local Block* current_block = nullptr;
inline thread_local int current_thread = 0;

}  // namespace memkernels::simt
