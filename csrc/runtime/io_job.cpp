#include "runtime/io_job.h"

#include <cerrno>
#include <utility>

namespace memkernels::runtime {

void IoJob::moved(int64_t count) {
  if (count == -EINTR || count == -EAGAIN) return;
  if (count > 0) done_ += count;
  const bool direct_write = kind == Kind::kWrite && storage_->direct();
  if (count > 0 && !(direct_write && count % kAlignment != 0)) return;  // direct I/O cannot go on from there
  const int error = count < 0 ? static_cast<int>(-count) : EIO;
  kind == Kind::kRead ? storage_->fail_to_read(error, bytes_, done_) : storage_->fail_to_write(error, bytes_, done_);
}

void IoJob::finish(std::unique_ptr<IoJob> job, std::exception_ptr error) {
  const std::shared_ptr<Transfer> transfer = job->transfer_;
  job = nullptr;  // lets go of memory and extent before whoever waits goes on
  transfer->finish_part(std::move(error));
}

}  // namespace memkernels::runtime
