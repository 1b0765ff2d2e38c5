#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>

#include "progress.h"

namespace memkernels::simt {

constexpr int kWarpSize = 32;

struct Deadlock {};

// Waits until `ready`, a failure or a deadlock. Progress counts the caller as stopped until whoever makes it ready
// resumes it.
template <typename Ready>
void wait_until(Progress& progress, std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Ready ready) {
  if (progress.stop()) throw Deadlock{};
  changed.wait(lock, [&] { return ready() || progress.failed(); });
  if (!ready()) throw Aborted{};
}

// __syncthreads: all threads of the block that have not left the kernel. It has a mutex of its own, as each warp has:
// a common one would order the memory of threads that did not synchronise, and hide their races.
class BlockBarrier {
 public:
  explicit BlockBarrier(Progress& progress) : progress_(progress) {}

  void reset(int threads) {
    alive_ = threads;
    arrived_ = 0;
  }

  void wait() {
    std::unique_lock lock(mutex_);
    if (progress_.failed()) throw Aborted{};
    ++arrived_;
    if (arrived_ == alive_) return release(arrived_ - 1);
    wait_until(progress_, changed_, lock, [this, before = generation_] { return generation_ != before; });
  }

  void leave() {
    std::lock_guard lock(mutex_);
    --alive_;
    if (arrived_ > 0 && arrived_ == alive_) release(arrived_);
  }

  void wake() {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

 private:
  void release(int waiting) {
    progress_.resume(waiting);
    arrived_ = 0;
    ++generation_;
    changed_.notify_all();
  }

  Progress& progress_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int alive_ = 0;
  int arrived_ = 0;
  uint64_t generation_ = 0;
};

// What the lanes named by a mask gave to one exchange; `active` are those that took part.
struct Lanes {
  std::array<uint64_t, kWarpSize> value;
  uint32_t active;
};

// Warp-wide exchange, of which shuffles, votes and __syncwarp are all cases. Lanes meet under the mask they name.
class Warp {
 public:
  explicit Warp(Progress& progress) : progress_(progress) {}

  void reset(int lanes) {
    alive_ = lanes == kWarpSize ? 0xFFFFFFFFu : (1u << lanes) - 1;
    groups_.clear();
  }

  Lanes exchange(uint32_t mask, int lane, uint64_t value) {
    std::unique_lock lock(mutex_);
    if (progress_.failed()) throw Aborted{};
    if (!(mask >> lane & 1)) throw std::logic_error("warp intrinsic called by a lane that its mask does not name");
    Group& group = groups_[mask];
    // Two alternating buffers: a lane may start the next exchange while others still read this one.
    const uint64_t before = group.generation;
    Lanes& lanes = group.buffer[before % 2];
    lanes.value[lane] = value;
    group.arrived |= 1u << lane;
    if (!release_if_complete(mask, group, 1u << lane)) {
      wait_until(progress_, changed_, lock, [&] { return group.generation != before; });
    }
    return lanes;
  }

  void leave(int lane) {
    std::lock_guard lock(mutex_);
    alive_ &= ~(1u << lane);
    for (auto& [mask, group] : groups_) {
      if (group.arrived) release_if_complete(mask, group, 0);
    }
  }

  void wake() {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

 private:
  struct Group {
    uint32_t arrived = 0;
    uint64_t generation = 0;
    Lanes buffer[2];
  };

  bool release_if_complete(uint32_t mask, Group& group, uint32_t running) {
    if (group.arrived != (mask & alive_)) return false;
    group.buffer[group.generation % 2].active = group.arrived;
    progress_.resume(__builtin_popcount(group.arrived & ~running));
    group.arrived = 0;
    ++group.generation;
    changed_.notify_all();
    return true;
  }

  Progress& progress_;
  std::mutex mutex_;
  std::condition_variable changed_;
  uint32_t alive_ = 0;
  std::map<uint32_t, Group> groups_;  // a map: a waiting lane holds a reference to its group
};

}  // namespace memkernels::simt
