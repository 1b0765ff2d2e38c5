#include "runtime/spill_file.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/crc32c.h"
#include "runtime/errors.h"
#include "runtime/io_job.h"

namespace memkernels::runtime {
namespace {

constexpr int64_t kBlock = 64 << 10;  // bytes that a checksum is of
constexpr int64_t kPart = 4 << 20;    // bytes that a job moves, a multiple of kBlock

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

// The jobs hold what they read and write, and not the file, whose destructor waits for them.
class WriteJob : public IoJob {
 public:
  WriteJob(std::shared_ptr<Extent> extent, std::shared_ptr<SlabBlock> block, std::shared_ptr<Copy> after, int64_t first,
           int64_t bytes)
      : IoJob(Kind::kWrite, extent->writing, extent->storage, block->data() + first, bytes, extent->offset + first),
        extent_(std::move(extent)),
        block_(std::move(block)),
        after_(std::move(after)),
        first_(first),
        bytes_(bytes) {}

  void begin() override {
    if (after_) after_->wait();
  }

  // Memory that this processor has just read takes longer to write to disk, where another copies it.
  void end() override {
    crc32c_blocks(bytes_of(block_->data() + first_), bytes_, kBlock, &extent_->checksums[first_ / kBlock]);
  }

 private:
  const std::shared_ptr<Extent> extent_;
  const std::shared_ptr<SlabBlock> block_;
  const std::shared_ptr<Copy> after_;
  const int64_t first_, bytes_;
};

class ReadJob : public IoJob {
 public:
  ReadJob(std::shared_ptr<Transfer> transfer, std::shared_ptr<Extent> extent, std::shared_ptr<SlabBlock> block,
          int64_t first, int64_t bytes)
      : IoJob(Kind::kRead, std::move(transfer), extent->storage, block->data() + first, bytes, extent->offset + first),
        extent_(std::move(extent)),
        block_(std::move(block)),
        first_(first),
        bytes_(bytes) {}

  void end() override {
    uint32_t found[kPart / kBlock];
    crc32c_blocks(bytes_of(block_->data() + first_), bytes_, kBlock, found);
    for (int64_t i = 0; i * kBlock < bytes_; ++i) {
      if (found[i] == extent_->checksums[first_ / kBlock + i]) continue;
      throw FileError(EIO,
                      "disk tier: the checksum of " + std::to_string(std::min(kBlock, bytes_ - i * kBlock)) +
                          " bytes at offset " + std::to_string(extent_->offset + first_ + i * kBlock) +
                          " does not match: the file was damaged",
                      extent_->storage->folder());
    }
  }

 private:
  const std::shared_ptr<Extent> extent_;
  const std::shared_ptr<SlabBlock> block_;
  const int64_t first_, bytes_;
};

}  // namespace

Extent::Extent(std::shared_ptr<SpillStorage> storage_, int64_t bytes_)
    : storage(std::move(storage_)),
      bytes(bytes_),
      capacity(round_up(bytes_, kAlignment)),
      offset(storage->allocate(capacity)),
      checksums((capacity + kBlock - 1) / kBlock),
      writing(std::make_shared<Transfer>(part_count(capacity))) {}

SpillFile::SpillFile(const std::string& folder, int threads, bool io_uring)
    : storage_(std::make_shared<SpillStorage>(folder)), pool_(threads, io_uring) {}

std::shared_ptr<Extent> SpillFile::write(const std::shared_ptr<SlabBlock>& block, const std::shared_ptr<Copy>& after) {
  storage_->check_owner(block->bytes());
  const auto extent = std::make_shared<Extent>(storage_, block->bytes());
  for_each_part(extent->capacity, [&](int64_t first, int64_t bytes) {
    pool_.submit(std::make_unique<WriteJob>(extent, block, after, first, bytes));
  });
  written_ += extent->capacity;
  return extent;
}

std::shared_ptr<Transfer> SpillFile::read(const std::shared_ptr<Extent>& extent,
                                          const std::shared_ptr<SlabBlock>& block) {
  storage_->check_owner(block->bytes());
  if (extent->storage != storage_) throw std::invalid_argument("extent: expected one of this file.");
  if (extent->bytes != block->bytes()) {
    throw std::invalid_argument("block: expected " + std::to_string(extent->bytes) + " bytes, got " +
                                std::to_string(block->bytes()) + ".");
  }
  if (!extent->writing->done()) throw std::invalid_argument("extent: expected one that is written.");
  const auto transfer = std::make_shared<Transfer>(part_count(extent->capacity));
  for_each_part(extent->capacity, [&](int64_t first, int64_t bytes) {
    pool_.submit(std::make_unique<ReadJob>(transfer, extent, block, first, bytes));
  });
  read_ += extent->capacity;
  return transfer;
}

}  // namespace memkernels::runtime
