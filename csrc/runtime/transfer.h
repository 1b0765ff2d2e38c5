// What becomes of bytes that move in several parts.
#pragma once

#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>

namespace memkernels::runtime {

// Done when each of its parts has finished; the first error is kept for whoever waits.
class Transfer {
 public:
  explicit Transfer(int64_t parts) : remaining_(parts) {}

  void finish_part(std::exception_ptr error = nullptr);
  bool done() const;
  void wait() const;  // throws the error; in a forked child one of its own, since no thread there moves anything

 private:
  const pid_t owner_ = getpid();
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  int64_t remaining_;
  std::exception_ptr error_;
};

}  // namespace memkernels::runtime
