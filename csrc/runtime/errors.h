// Errors that Python sees as OSError (with errno and path) and MemoryError.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace memkernels::runtime {

struct FileError : std::runtime_error {
  FileError(int code_, const std::string& message, std::string path_)
      : std::runtime_error(message), code(code_), path(std::move(path_)) {}

  int code;
  std::string path;
};

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace memkernels::runtime
