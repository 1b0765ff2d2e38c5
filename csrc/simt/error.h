#pragma once

#include <stdexcept>
#include <string>

namespace memkernels::simt {

// What a launch throws when one of its threads failed: says which thread of which block, and why.
class KernelError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Unwinds the other threads of a block in which one has failed.
struct Aborted {};

// Unwinds a block that waits for one that has failed.
struct OtherBlockFailed {};

[[noreturn]] inline void fail_assertion(const char* condition, const char* file, int line) {
  throw std::logic_error(std::string("device assertion `") + condition + "` failed at " + file + ":" +
                         std::to_string(line));
}

}  // namespace memkernels::simt
