// Copies between device memory and blocks of a slab, on two streams of their own, one each way. A copy waits for what
// its caller's stream was given before, and that stream waits for a copy only where it is told to. A block goes back to
// its slab, and an event is used again, only when the copy is done.
//
// With HostCalls the memory is the host's and the streams are two threads. TieredStore brings back by them what is in
// host memory. What is saved on a CPU is copied by the thread that saves it: a copy beside would take cores and
// bandwidth from what computes, and until it is done the tensor could be neither freed nor written to.
//
// A forked child has neither the threads nor CUDA: there copies neither begin nor are waited for, which is an error,
// and what was inherited may go.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "runtime/cuda_calls.h"
#include "runtime/pinned_slab.h"

namespace memkernels::runtime {

class EventPool {
 public:
  EventPool(std::shared_ptr<const CudaCalls> cuda, int device) : cuda(std::move(cuda)), device(device) {}
  ~EventPool();
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  CudaEvent take();
  void give_back(CudaEvent event);
  bool in_fork() const { return getpid() != owner_; }
  void check_owner() const;

  const std::shared_ptr<const CudaCalls> cuda;
  const int device;

 private:
  const pid_t owner_ = getpid();
  std::mutex mutex_;
  std::vector<CudaEvent> events_;
};

// A copy under way. The engine holds it until it is done, so that its event comes back no earlier.
class Copy {
 public:
  explicit Copy(std::shared_ptr<EventPool> events) : events_(std::move(events)), event_(events_->take()) {}
  ~Copy() { events_->give_back(event_); }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;

  bool done() const;
  void wait() const;
  // What `stream` is given from now on begins after the copy.
  void wait_on(uintptr_t stream) const;

 private:
  friend class CopyEngine;
  const std::shared_ptr<EventPool> events_;
  const CudaEvent event_;
};

class CopyEngine {
 public:
  CopyEngine(std::shared_ptr<const CudaCalls> cuda, int device);
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // From device memory into the block, or back, after what `stream` was given before.
  std::shared_ptr<Copy> out(uintptr_t from, const std::shared_ptr<SlabBlock>& block, uintptr_t stream);
  std::shared_ptr<Copy> into(uintptr_t to, const std::shared_ptr<SlabBlock>& block, uintptr_t stream);

  // Where copies run: device memory must not be given out again before its stream has passed.
  uintptr_t out_stream() const { return reinterpret_cast<uintptr_t>(out_.stream); }
  uintptr_t in_stream() const { return reinterpret_cast<uintptr_t>(in_.stream); }
  int64_t pending();

 private:
  struct Pending {
    std::shared_ptr<Copy> copy;
    std::shared_ptr<SlabBlock> block;
  };
  struct Direction {
    CudaStream stream = nullptr;
    std::deque<Pending> pending;
  };

  std::shared_ptr<Copy> begin(Direction& direction, uintptr_t address, const std::shared_ptr<SlabBlock>& block,
                              uintptr_t stream);
  static void reap(Direction& direction);

  const std::shared_ptr<EventPool> events_;
  std::mutex mutex_;
  Direction out_, in_;
};

}  // namespace memkernels::runtime
