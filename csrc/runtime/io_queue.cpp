#include "runtime/io_queue.h"

#include <iterator>
#include <utility>

namespace memkernels::runtime {

void IoQueue::push(std::unique_ptr<IoJob> job) {
  {
    const std::lock_guard lock(mutex_);
    (job->kind == IoJob::Kind::kRead ? reads_ : writes_).push_back(std::move(job));
  }
  arrived_.notify_one();
}

std::unique_ptr<IoJob> IoQueue::take(bool wait) {
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return closed_ || !reads_.empty() || !writes_.empty(); };
  if (wait) arrived_.wait(lock, ready);
  if (closed_ || !ready()) return nullptr;
  auto& jobs = reads_.empty() ? writes_ : reads_;
  auto job = std::move(jobs.front());
  jobs.pop_front();
  return job;
}

std::deque<std::unique_ptr<IoJob>> IoQueue::close() {
  std::deque<std::unique_ptr<IoJob>> left;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    for (auto* jobs : {&reads_, &writes_}) {
      left.insert(left.end(), std::make_move_iterator(jobs->begin()), std::make_move_iterator(jobs->end()));
      jobs->clear();
    }
  }
  arrived_.notify_all();
  return left;
}

}  // namespace memkernels::runtime
