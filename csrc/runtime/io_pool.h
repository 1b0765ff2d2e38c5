// Threads that read and write, through io_uring where that is to be had, or by a system call for each part.
#pragma once

#include <unistd.h>

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "runtime/io_queue.h"

namespace memkernels::runtime {

// What a thread does until the queue is closed.
using IoWorker = std::function<void(IoQueue& queue)>;

// Runs jobs on `threads` threads. Those that have not begun when the pool goes fail.
class IoPool {
 public:
  IoPool(int threads, bool io_uring);
  ~IoPool();
  IoPool(const IoPool&) = delete;
  IoPool& operator=(const IoPool&) = delete;

  void submit(std::unique_ptr<IoJob> job) { queue_->push(std::move(job)); }
  bool io_uring() const { return io_uring_; }

 private:
  void stop();

  const pid_t owner_ = getpid();
  // The threads are not there in a forked child, where the queue is left as it is.
  std::unique_ptr<IoQueue> queue_ = std::make_unique<IoQueue>();
  bool io_uring_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace memkernels::runtime
