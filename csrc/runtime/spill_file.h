// A file without a name that holds blocks of a slab: preallocated in steps, divided by best fit, written and read by a
// pool of threads past the page cache, with a CRC32C for each 64 KiB. The system removes it with the process, however
// that ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/best_fit.h"
#include "runtime/copy_engine.h"
#include "runtime/io_pool.h"
#include "runtime/pinned_slab.h"

namespace memkernels::runtime {

// The open file and its free ranges.
class SpillStorage {
 public:
  explicit SpillStorage(std::string folder);
  ~SpillStorage();
  SpillStorage(const SpillStorage&) = delete;
  SpillStorage& operator=(const SpillStorage&) = delete;

  int64_t allocate(int64_t bytes);
  void release(int64_t offset, int64_t bytes);
  void write(const std::byte* data, int64_t bytes, int64_t offset) const;
  void read(std::byte* data, int64_t bytes, int64_t offset) const;

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

// A range of the file; it is free again with the last who holds it.
class Extent {
 public:
  Extent(std::shared_ptr<SpillStorage> storage, int64_t bytes);
  ~Extent() { storage->release(offset, capacity); }
  Extent(const Extent&) = delete;
  Extent& operator=(const Extent&) = delete;

  const std::shared_ptr<SpillStorage> storage;
  const int64_t bytes, capacity, offset;
  std::vector<uint32_t> checksums;
  std::shared_ptr<Transfer> writing;
};

class SpillFile {
 public:
  SpillFile(const std::string& folder, int threads);

  // Queues the block to be written to an extent of its own, once the copy that fills it is done where there is one; the
  // block stays as long as that takes.
  std::shared_ptr<Extent> write(const std::shared_ptr<SlabBlock>& block, const std::shared_ptr<Copy>& after);
  // Queues an extent, written before, to be read into a block of its size.
  std::shared_ptr<Transfer> read(const std::shared_ptr<Extent>& extent, const std::shared_ptr<SlabBlock>& block);

  const SpillStorage& storage() const { return *storage_; }
  int64_t bytes_written() const { return written_; }
  int64_t bytes_read() const { return read_; }

 private:
  std::shared_ptr<SpillStorage> storage_;
  std::atomic<int64_t> written_ = 0, read_ = 0;
  IoPool pool_;
};

}  // namespace memkernels::runtime
