// What the test programs share: a program runs its cases, names those that fail and exits with 1 if any did.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

inline int failures = 0;

inline bool expect(bool condition, const std::string& what) {
  if (!condition) {
    ++failures;
    std::printf("FAILED %s\n", what.c_str());
  }
  return condition;
}

// The message of the KernelError that `run` throws, "" if it throws none.
template <typename Run>
std::string kernel_error(Run run) {
  try {
    run();
  } catch (const memkernels::simt::KernelError& error) {
    return error.what();
  }
  return "";
}

template <typename Run>
void expect_kernel_error(const std::string& part, Run run) {
  const std::string message = kernel_error(run);
  expect(message.find(part) != std::string::npos, "an error with `" + part + "`, got `" + message + "`");
}

// `size` elements with canaries around them; the first element lies `offset` elements past a 16-byte boundary.
template <typename T>
class Guarded {
 public:
  Guarded(int64_t size, int64_t offset, T canary)
      : size_(size), first_(kGuard + offset), canary_(canary), data_(size + offset + 2 * kGuard, canary) {}

  T* data() { return data_.data() + first_; }
  T& operator[](int64_t index) { return data()[index]; }
  int64_t size() const { return size_; }
  bool intact() const {
    for (int64_t i = 0; i < static_cast<int64_t>(data_.size()); ++i) {
      if ((i < first_ || i >= first_ + size_) && data_[i] != canary_) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 64;  // keeps the alignment of the allocation, which is 16 bytes

  int64_t size_;
  int64_t first_;
  T canary_;
  std::vector<T> data_;
};

// Uniform in [-1, 1), the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  double operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 11) * 0x1p-52 - 1.0;
  }

 private:
  uint64_t state_;
};
