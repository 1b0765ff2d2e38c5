#include "runtime/io_pool.h"

#include <cerrno>
#include <stdexcept>
#include <utility>

#include "runtime/uring.h"

namespace memkernels::runtime {
namespace {

int64_t move_once(const IoJob& job) {
  const int64_t count = job.kind == IoJob::Kind::kRead ? pread(job.descriptor(), job.data(), job.left(), job.offset())
                                                       : pwrite(job.descriptor(), job.data(), job.left(), job.offset());
  return count < 0 ? -errno : count;
}

void work_one_by_one(IoQueue& queue) {
  while (auto job = queue.take(true)) {
    std::exception_ptr error;
    try {
      job->begin();
      while (job->left() > 0) job->moved(move_once(*job));
      job->end();
    } catch (...) {
      error = std::current_exception();
    }
    IoJob::finish(std::move(job), std::move(error));
  }
}

}  // namespace

IoPool::IoPool(int threads, bool io_uring) {
  if (threads < 1) throw std::invalid_argument("threads: expected one at least.");
  std::vector<IoWorker> workers;
  if (io_uring) workers = uring_workers(threads);
  io_uring_ = !workers.empty();
  workers.resize(threads, work_one_by_one);
  try {
    for (IoWorker& worker : workers) threads_.emplace_back(std::move(worker), std::ref(*queue_));
  } catch (...) {
    stop();  // those that there are
    throw;
  }
}

IoPool::~IoPool() {
  if (getpid() != owner_) {
    // A forked child has the objects but not the threads: neither can be joined or destroyed.
    queue_.release();
    new std::vector<std::thread>(std::move(threads_));
    return;
  }
  stop();
}

void IoPool::stop() {
  auto left = queue_->close();
  for (std::thread& thread : threads_) thread.join();
  const auto closed = std::make_exception_ptr(std::runtime_error("the file was closed before this transfer began."));
  for (auto& job : left) IoJob::finish(std::move(job), closed);
}

}  // namespace memkernels::runtime
