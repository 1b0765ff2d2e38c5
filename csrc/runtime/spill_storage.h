// A file without a name: open, preallocated in steps, divided by best fit. Steps at the end that are free may go back
// to the disk.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <string>

#include "runtime/best_fit.h"

namespace memkernels::runtime {

class SpillStorage {
 public:
  explicit SpillStorage(std::string folder);
  ~SpillStorage();
  SpillStorage(const SpillStorage&) = delete;
  SpillStorage& operator=(const SpillStorage&) = delete;

  int64_t allocate(int64_t bytes);
  void release(int64_t offset, int64_t bytes);
  // Gives back the steps at the end that nothing was in since this was called last.
  void trim();
  // Throw the error for which a transfer of `wanted` bytes stopped.
  [[noreturn]] void fail_to_write(int error, int64_t wanted, int64_t written) const;
  [[noreturn]] void fail_to_read(int error, int64_t wanted, int64_t available) const;

  RegionStatistics statistics() const;
  int descriptor() const { return descriptor_; }
  bool direct() const { return direct_; }
  bool in_memory() const;
  // Throws in a forked child, which has none of the threads that transfer, for a transfer of `bytes`.
  void check_owner(int64_t bytes) const;
  const std::string& folder() const { return folder_; }

 private:
  void grow(int64_t missing);
  bool takes_direct_io() const;

  const std::string folder_;
  const pid_t owner_ = getpid();
  int descriptor_ = -1;
  bool direct_ = true;
  mutable std::mutex mutex_;
  BestFit ranges_;
};

}  // namespace memkernels::runtime
