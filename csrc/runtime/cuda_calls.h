// The calls of the CUDA runtime that copies need, found at run time in the library that torch has loaded. Building this
// takes nothing of CUDA, and tests give a library of their own.
#pragma once

#include <cstddef>
#include <string>

namespace memkernels::runtime {

using CudaStream = void*;
using CudaEvent = void*;

class CudaCalls {
 public:
  explicit CudaCalls(const std::string& library);
  CudaCalls(const CudaCalls&) = delete;
  CudaCalls& operator=(const CudaCalls&) = delete;

  // Throws where a call did not return cudaSuccess; the runtime keeps no error that whoever asks next would take for
  // its own.
  void check(int status, const char* call) const;

  int (*set_device)(int device);
  int (*get_device)(int* device);
  int (*stream_create)(CudaStream* stream, unsigned flags);
  int (*stream_destroy)(CudaStream stream);
  int (*stream_wait_event)(CudaStream stream, CudaEvent event, unsigned flags);
  int (*event_create)(CudaEvent* event, unsigned flags);
  int (*event_destroy)(CudaEvent event);
  int (*event_record)(CudaEvent event, CudaStream stream);
  int (*event_query)(CudaEvent event);
  int (*event_synchronize)(CudaEvent event);
  int (*memcpy_async)(void* to, const void* from, size_t bytes, int kind, CudaStream stream);
  int (*host_register)(void* data, size_t bytes, unsigned flags);
  int (*host_unregister)(void* data);
  const char* (*error_string)(int status);
  int (*get_last_error)();

 protected:
  CudaCalls() = default;
};

}  // namespace memkernels::runtime
