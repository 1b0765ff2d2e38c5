#include "runtime/io_pool.h"

#include <stdexcept>
#include <utility>

namespace memkernels::runtime {

void Transfer::finish_part(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  if (error && !error_) error_ = std::move(error);
  if (--remaining_ == 0) changed_.notify_all();
}

bool Transfer::done() const {
  const std::lock_guard lock(mutex_);
  return remaining_ == 0;
}

void Transfer::wait() const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return remaining_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

IoPool::IoPool(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected one at least.");
  try {
    for (int i = 0; i < threads; ++i) threads_.emplace_back(work, std::ref(*shared_));
  } catch (...) {
    stop();  // those that there are
    throw;
  }
}

IoPool::~IoPool() {
  if (getpid() != owner_) {
    // A forked child has the objects but not the threads: neither can be joined or destroyed.
    shared_.release();
    new std::vector<std::thread>(std::move(threads_));
    return;
  }
  std::deque<Job> dropped;
  {
    const std::lock_guard lock(shared_->mutex);
    for (auto* queue : {&shared_->reads, &shared_->writes}) {
      for (Job& job : *queue) dropped.push_back(std::move(job));
      queue->clear();
    }
  }
  stop();
  const auto closed = std::make_exception_ptr(std::runtime_error("the file was closed before this transfer began."));
  for (const Job& job : dropped) job.transfer->finish_part(closed);
}

void IoPool::stop() {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->closing = true;
  }
  shared_->arrived.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void IoPool::submit(Kind kind, std::shared_ptr<Transfer> transfer, std::function<void()> run) {
  {
    const std::lock_guard lock(shared_->mutex);
    (kind == Kind::kRead ? shared_->reads : shared_->writes).push_back({std::move(transfer), std::move(run)});
  }
  shared_->arrived.notify_one();
}

void IoPool::work(Shared& shared) {
  std::unique_lock lock(shared.mutex);
  while (true) {
    shared.arrived.wait(lock, [&] { return shared.closing || !shared.reads.empty() || !shared.writes.empty(); });
    if (shared.closing) return;
    auto& queue = shared.reads.empty() ? shared.writes : shared.reads;
    Job job = std::move(queue.front());
    queue.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      job.run();
    } catch (...) {
      error = std::current_exception();
    }
    job.run = nullptr;  // lets go of memory and extent before whoever waits goes on
    job.transfer->finish_part(std::move(error));
    job.transfer = nullptr;
    lock.lock();
  }
}

}  // namespace memkernels::runtime
