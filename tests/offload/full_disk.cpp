// For LD_PRELOAD: a disk that fills up. FULL_DISK_PREALLOCATES bytes can be preallocated, FULL_DISK_HOLDS written; a
// write across that limit ends FULL_DISK_SHORT_BY bytes before it. It knows nothing of io_uring.
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

namespace {

long long number(const char* name, long long otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : otherwise;
}

constexpr long long kEverything = 1LL << 62;

}  // namespace

extern "C" {

int fallocate(int fd, int mode, off_t offset, off_t bytes) {
  const long long holds = number("FULL_DISK_PREALLOCATES", kEverything);
  if (offset + bytes > holds) {
    if (offset < holds) syscall(SYS_fallocate, fd, mode, offset, holds - offset);  // as ext4, which keeps what it found
    errno = ENOSPC;
    return -1;
  }
  return static_cast<int>(syscall(SYS_fallocate, fd, mode, offset, bytes));
}

ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  const long long holds = number("FULL_DISK_HOLDS", kEverything);
  if (offset >= holds) {
    errno = ENOSPC;
    return -1;
  }
  if (offset + static_cast<long long>(bytes) <= holds) return syscall(SYS_pwrite64, fd, data, bytes, offset);
  return holds - offset - number("FULL_DISK_SHORT_BY", 0);
}
}
