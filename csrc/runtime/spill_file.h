// A file without a name that holds blocks of a slab: written and read by a pool of threads past the page cache, with a
// CRC32C for each 64 KiB. The system removes it with the process, however that ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/copy_engine.h"
#include "runtime/io_pool.h"
#include "runtime/pinned_slab.h"
#include "runtime/spill_storage.h"

namespace memkernels::runtime {

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
  SpillFile(const std::string& folder, int threads, bool io_uring);

  // Queues the block to be written to an extent of its own, once the copy that fills it is done where there is one; the
  // block stays as long as that takes.
  std::shared_ptr<Extent> write(const std::shared_ptr<SlabBlock>& block, const std::shared_ptr<Copy>& after);
  // Queues an extent, written before, to be read into a block of its size.
  std::shared_ptr<Transfer> read(const std::shared_ptr<Extent>& extent, const std::shared_ptr<SlabBlock>& block);

  void trim() { storage_->trim(); }
  const SpillStorage& storage() const { return *storage_; }
  bool io_uring() const { return pool_.io_uring(); }
  int64_t bytes_written() const { return written_; }
  int64_t bytes_read() const { return read_; }

 private:
  std::shared_ptr<SpillStorage> storage_;
  std::atomic<int64_t> written_ = 0, read_ = 0;
  IoPool pool_;
};

}  // namespace memkernels::runtime
