// io_uring, by liburing, where the build found it (MEMKERNELS_LIBURING) and the kernel lets this process have it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/io_pool.h"

namespace memkernels::runtime {

// Why there is no io_uring here; nothing where there is.
std::optional<std::string> io_uring_missing();

// Workers with a ring each, which hands several parts to the kernel at once; none where there is no io_uring. The
// thread computes one part's checksums while those before it move.
std::vector<IoWorker> uring_workers(int threads);

}  // namespace memkernels::runtime
