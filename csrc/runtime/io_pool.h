// Threads that read and write, and what becomes of a transfer that several of them share.
#pragma once

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace memkernels::runtime {

// Done when each of its parts has finished; the first error is kept for whoever waits.
class Transfer {
 public:
  explicit Transfer(int64_t parts) : remaining_(parts) {}

  void finish_part(std::exception_ptr error = nullptr);
  bool done() const;
  void wait() const;  // throws the error

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  int64_t remaining_;
  std::exception_ptr error_;
};

// Runs jobs on `threads` threads, each busy with one; reads go before writes, which nobody waits for. Jobs that have
// not started when the pool goes fail.
class IoPool {
 public:
  enum class Kind { kRead, kWrite };

  explicit IoPool(int threads);
  ~IoPool();
  IoPool(const IoPool&) = delete;
  IoPool& operator=(const IoPool&) = delete;

  void submit(Kind kind, std::shared_ptr<Transfer> transfer, std::function<void()> run);

 private:
  struct Job {
    std::shared_ptr<Transfer> transfer;
    std::function<void()> run;
  };
  // What the threads use. They are not there in a forked child, where it is left as it is.
  struct Shared {
    std::mutex mutex;
    std::condition_variable arrived;
    std::deque<Job> reads, writes;
    bool closing = false;
  };

  static void work(Shared& shared);
  void stop();

  const pid_t owner_ = getpid();
  std::unique_ptr<Shared> shared_ = std::make_unique<Shared>();
  std::vector<std::thread> threads_;
};

}  // namespace memkernels::runtime
