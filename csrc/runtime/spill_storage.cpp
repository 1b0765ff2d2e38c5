#include "runtime/spill_storage.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "runtime/errors.h"

namespace memkernels::runtime {
namespace {

constexpr int64_t kStep = 256 << 20;  // bytes that the file grows by where the disk has them, and shrinks by
constexpr mode_t kMode = S_IRUSR | S_IWUSR;

int open_unnamed(const std::string& folder) {
  int descriptor = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, kMode);
  if (descriptor < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
    std::string name = folder + "/.memkernels-XXXXXX";
    descriptor = mkostemp(name.data(), O_CLOEXEC);  // mode 0600
    if (descriptor >= 0) unlink(name.c_str());
  }
  return descriptor;
}

int64_t free_bytes(int descriptor) {
  struct statvfs status;
  return fstatvfs(descriptor, &status) == 0 ? static_cast<int64_t>(status.f_bavail * status.f_frsize) : 0;
}

}  // namespace

SpillStorage::SpillStorage(std::string folder) : folder_(std::move(folder)), descriptor_(open_unnamed(folder_)) {
  if (descriptor_ < 0) throw FileError(errno, std::string("disk tier: ") + std::strerror(errno), folder_);
  direct_ = takes_direct_io();
}

SpillStorage::~SpillStorage() {
  close(descriptor_);
}

// Whether the file system reads past its cache at the alignment used here. Where it does not, its cache stands between.
bool SpillStorage::takes_direct_io() const {
  const int flags = fcntl(descriptor_, F_GETFL);
  if (fcntl(descriptor_, F_SETFL, flags | O_DIRECT) != 0) return false;
  alignas(kAlignment) std::byte page[kAlignment];
  if (ftruncate(descriptor_, kAlignment) == 0 && pread(descriptor_, page, kAlignment, 0) == kAlignment) return true;
  fcntl(descriptor_, F_SETFL, flags);
  return false;
}

bool SpillStorage::in_memory() const {
  struct statfs status;
  if (fstatfs(descriptor_, &status) != 0) return false;
  return status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC;
}

void SpillStorage::check_owner(int64_t bytes) const {
  if (getpid() == owner_) return;
  throw std::runtime_error("disk tier: the file in " + folder_ +
                           " belongs to the process that opened it; a fork of it wanted to move " +
                           std::to_string(bytes) + " bytes.");
}

int64_t SpillStorage::allocate(int64_t bytes) {
  const std::lock_guard lock(mutex_);
  auto offset = ranges_.allocate(bytes);
  if (!offset) {
    grow(ranges_.missing(bytes));
    offset = ranges_.allocate(bytes);
  }
  return *offset;
}

void SpillStorage::grow(int64_t missing) {
  int error = 0;
  // The disk may have what is missing where it has no whole step.
  for (const int64_t step : {round_up(missing, kStep), missing}) {
    int failed = fallocate(descriptor_, 0, ranges_.size(), step);
    // Without preallocation a full disk shows when it is written.
    if (failed && errno == EOPNOTSUPP) failed = ftruncate(descriptor_, ranges_.size() + step);
    if (!failed) return ranges_.grow(step);
    error = errno;
    if (ftruncate(descriptor_, ranges_.size()) != 0) break;  // ext4 keeps what it found before the disk was full
  }
  throw FileError(error,
                  std::string("disk tier: ") + std::strerror(error) + ": " + std::to_string(missing) +
                      " bytes wanted beyond the file's " + std::to_string(ranges_.size()) + ", " +
                      std::to_string(free_bytes(descriptor_)) + " available",
                  folder_);
}

void SpillStorage::release(int64_t offset, int64_t bytes) {
  if (getpid() != owner_) return;  // in a forked child the mutex may be held by a thread that is not there
  const std::lock_guard lock(mutex_);
  ranges_.release(offset, bytes);
}

void SpillStorage::trim() {
  if (getpid() != owner_) return;
  const std::lock_guard lock(mutex_);
  const int64_t size = round_up(ranges_.take_reached(), kStep);
  if (size < ranges_.size() && ftruncate(descriptor_, size) == 0) ranges_.shrink(size);
}

RegionStatistics SpillStorage::statistics() const {
  const std::lock_guard lock(mutex_);
  return ranges_.statistics();
}

void SpillStorage::fail_to_write(int error, int64_t wanted, int64_t written) const {
  throw FileError(error,
                  std::string("disk tier: short write: ") + std::strerror(error) + ": " + std::to_string(wanted) +
                      " bytes wanted, " + std::to_string(written) + " written, " +
                      std::to_string(free_bytes(descriptor_)) + " available",
                  folder_);
}

void SpillStorage::fail_to_read(int error, int64_t wanted, int64_t available) const {
  throw FileError(error,
                  std::string("disk tier: short read: ") + std::strerror(error) + ": " + std::to_string(wanted) +
                      " bytes wanted, " + std::to_string(available) + " available",
                  folder_);
}

}  // namespace memkernels::runtime
