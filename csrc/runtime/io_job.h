// A part of a transfer between memory and a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>

#include "runtime/spill_storage.h"
#include "runtime/transfer.h"

namespace memkernels::runtime {

// Whoever moves its bytes calls `begin`, `moved` after each system call until nothing is left, and `end`; each of them
// may throw, which fails the transfer. Then comes `finish`, with the error where there was one.
class IoJob {
 public:
  enum class Kind { kRead, kWrite };

  IoJob(Kind kind_, std::shared_ptr<Transfer> transfer, std::shared_ptr<const SpillStorage> storage, std::byte* data,
        int64_t bytes, int64_t offset)
      : kind(kind_),
        transfer_(std::move(transfer)),
        storage_(std::move(storage)),
        data_(data),
        bytes_(bytes),
        offset_(offset) {}
  virtual ~IoJob() = default;
  IoJob(const IoJob&) = delete;
  IoJob& operator=(const IoJob&) = delete;

  virtual void begin() {}
  virtual void end() {}
  // `count` bytes were moved, or none, for the error -count.
  void moved(int64_t count);
  static void finish(std::unique_ptr<IoJob> job, std::exception_ptr error = nullptr);

  const Kind kind;
  int descriptor() const { return storage_->descriptor(); }
  // What is left to move, and where it stands in the file.
  std::byte* data() const { return data_ + done_; }
  int64_t left() const { return bytes_ - done_; }
  int64_t offset() const { return offset_ + done_; }

 private:
  const std::shared_ptr<Transfer> transfer_;
  const std::shared_ptr<const SpillStorage> storage_;
  std::byte* const data_;
  const int64_t bytes_, offset_;
  int64_t done_ = 0;
};

}  // namespace memkernels::runtime
