// Where threads find the next part to move: reads go before writes, which nobody waits for.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include "runtime/io_job.h"

namespace memkernels::runtime {

class IoQueue {
 public:
  void push(std::unique_ptr<IoJob> job);
  // The next job. Null where there is none, or with `wait`, until there is one, where the queue was closed.
  std::unique_ptr<IoJob> take(bool wait);
  // Gives out no more jobs; returns those that are left.
  std::deque<std::unique_ptr<IoJob>> close();

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<std::unique_ptr<IoJob>> reads_, writes_;
  bool closed_ = false;
};

}  // namespace memkernels::runtime
