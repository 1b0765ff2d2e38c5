#include "runtime/spill_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "runtime/crc32c.h"
#include "runtime/errors.h"

namespace memkernels::runtime {
namespace {

constexpr int64_t kBlock = 64 << 10;  // bytes that a checksum is of
constexpr int64_t kPart = 4 << 20;    // bytes that a job moves, a multiple of kBlock
constexpr int64_t kStep = 256 << 20;  // bytes that the file grows by where the disk has them
constexpr mode_t kMode = S_IRUSR | S_IWUSR;

std::string number(int64_t value) {
  return std::to_string(value);
}

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

// Calls body(first byte, bytes) for each part of a block or extent.
template <typename Body>
void for_each_part(int64_t capacity, Body&& body) {
  for (int64_t first = 0; first < capacity; first += kPart) body(first, std::min(kPart, capacity - first));
}

int64_t part_count(int64_t capacity) {
  return (capacity + kPart - 1) / kPart;
}

const uint8_t* bytes_of(const std::byte* data) {
  return reinterpret_cast<const uint8_t*>(data);
}

void check_checksums(const Extent& extent, const std::byte* data, int64_t first, int64_t bytes) {
  uint32_t found[kPart / kBlock];
  crc32c_blocks(bytes_of(data), bytes, kBlock, found);
  for (int64_t i = 0; i * kBlock < bytes; ++i) {
    if (found[i] == extent.checksums[first / kBlock + i]) continue;
    throw FileError(EIO,
                    "disk tier: the checksum of " + number(std::min(kBlock, bytes - i * kBlock)) + " bytes at offset " +
                        number(extent.offset + first + i * kBlock) + " does not match: the file was damaged",
                    extent.storage->folder());
  }
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
                           " belongs to the process that opened it; a fork of it" + " wanted to move " + number(bytes) +
                           " bytes.");
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
  }
  throw FileError(error,
                  std::string("disk tier: ") + std::strerror(error) + ": " + number(missing) +
                      " bytes wanted beyond the file's " + number(ranges_.size()) + ", " +
                      number(free_bytes(descriptor_)) + " available",
                  folder_);
}

void SpillStorage::release(int64_t offset, int64_t bytes) {
  if (getpid() != owner_) return;  // in a forked child the mutex may be held by a thread that is not there
  const std::lock_guard lock(mutex_);
  ranges_.release(offset, bytes);
}

RegionStatistics SpillStorage::statistics() const {
  const std::lock_guard lock(mutex_);
  return ranges_.statistics();
}

void SpillStorage::write(const std::byte* data, int64_t bytes, int64_t offset) const {
  for (int64_t done = 0; done < bytes;) {
    const int64_t count = pwrite(descriptor_, data + done, bytes - done, offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0 || (direct_ && count % kAlignment != 0)) {  // direct I/O cannot go on from there
      const int error = count < 0 ? errno : EIO;
      throw FileError(error,
                      std::string("disk tier: short write: ") + std::strerror(error) + ": " + number(bytes) +
                          " bytes wanted, " + number(done + std::max<int64_t>(count, 0)) + " written, " +
                          number(free_bytes(descriptor_)) + " available",
                      folder_);
    }
    done += count;
  }
}

void SpillStorage::read(std::byte* data, int64_t bytes, int64_t offset) const {
  for (int64_t done = 0; done < bytes;) {
    const int64_t count = pread(descriptor_, data + done, bytes - done, offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      const int error = count < 0 ? errno : EIO;
      throw FileError(error,
                      std::string("disk tier: short read: ") + std::strerror(error) + ": " + number(bytes) +
                          " bytes wanted, " + number(done) + " available",
                      folder_);
    }
    done += count;
  }
}

Extent::Extent(std::shared_ptr<SpillStorage> storage_, int64_t bytes_)
    : storage(std::move(storage_)),
      bytes(bytes_),
      capacity(round_up(bytes_, kAlignment)),
      offset(storage->allocate(capacity)),
      checksums((capacity + kBlock - 1) / kBlock),
      writing(std::make_shared<Transfer>(part_count(capacity))) {}

SpillFile::SpillFile(const std::string& folder, int threads)
    : storage_(std::make_shared<SpillStorage>(folder)), pool_(threads) {}

std::shared_ptr<Extent> SpillFile::write(const std::shared_ptr<SlabBlock>& block, const std::shared_ptr<Copy>& after) {
  storage_->check_owner(block->bytes());
  const auto extent = std::make_shared<Extent>(storage_, block->bytes());
  for_each_part(extent->capacity, [&](int64_t first, int64_t bytes) {
    // The job holds what it reads and where it writes, and not the file, whose destructor waits for it.
    pool_.submit(IoPool::Kind::kWrite, extent->writing, [extent, block, after, first, bytes] {
      if (after) after->wait();
      const std::byte* data = block->data() + first;
      crc32c_blocks(bytes_of(data), bytes, kBlock, &extent->checksums[first / kBlock]);
      extent->storage->write(data, bytes, extent->offset + first);
    });
  });
  written_ += extent->capacity;
  return extent;
}

std::shared_ptr<Transfer> SpillFile::read(const std::shared_ptr<Extent>& extent,
                                          const std::shared_ptr<SlabBlock>& block) {
  storage_->check_owner(block->bytes());
  if (extent->storage != storage_) throw std::invalid_argument("extent: expected one of this file.");
  if (extent->bytes != block->bytes()) {
    throw std::invalid_argument("block: expected " + number(extent->bytes) + " bytes, got " + number(block->bytes()) +
                                ".");
  }
  if (!extent->writing->done()) throw std::invalid_argument("extent: expected one that is written.");
  const auto transfer = std::make_shared<Transfer>(part_count(extent->capacity));
  for_each_part(extent->capacity, [&](int64_t first, int64_t bytes) {
    pool_.submit(IoPool::Kind::kRead, transfer, [extent, block, first, bytes] {
      std::byte* data = block->data() + first;
      extent->storage->read(data, bytes, extent->offset + first);
      check_checksums(*extent, data, first, bytes);
    });
  });
  read_ += extent->capacity;
  return transfer;
}

}  // namespace memkernels::runtime
