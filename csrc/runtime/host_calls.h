// The calls of cuda_calls.h for memory of the host. A stream is a thread, which does what it is given in order; the
// null stream is the thread that calls, and what that was given before is done.
#pragma once

#include "runtime/cuda_calls.h"

namespace memkernels::runtime {

class HostCalls : public CudaCalls {
 public:
  HostCalls();
};

}  // namespace memkernels::runtime
