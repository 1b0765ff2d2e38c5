#include "runtime/transfer.h"

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
  if (getpid() != owner_)
    throw std::runtime_error("disk tier: a transfer of another process, of which this is a fork.");
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return remaining_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

}  // namespace memkernels::runtime
