#include "runtime/cuda_calls.h"

#include <dlfcn.h>

#include <stdexcept>
#include <type_traits>

namespace memkernels::runtime {

CudaCalls::CudaCalls(const std::string& library) {
  void* opened = dlopen(library.c_str(), RTLD_NOW);  // stays open: torch uses it too
  if (!opened) throw std::runtime_error("no CUDA runtime: " + std::string(dlerror()));
  const auto find = [&](auto& call, const char* name) {
    void* found = dlsym(opened, name);
    if (!found) throw std::runtime_error("no CUDA runtime: " + library + " has no " + name + ".");
    call = reinterpret_cast<std::remove_reference_t<decltype(call)>>(found);
  };
  find(set_device, "cudaSetDevice");
  find(get_device, "cudaGetDevice");
  find(stream_create, "cudaStreamCreateWithFlags");
  find(stream_destroy, "cudaStreamDestroy");
  find(stream_wait_event, "cudaStreamWaitEvent");
  find(event_create, "cudaEventCreateWithFlags");
  find(event_destroy, "cudaEventDestroy");
  find(event_record, "cudaEventRecord");
  find(event_query, "cudaEventQuery");
  find(event_synchronize, "cudaEventSynchronize");
  find(memcpy_async, "cudaMemcpyAsync");
  find(host_register, "cudaHostRegister");
  find(host_unregister, "cudaHostUnregister");
  find(error_string, "cudaGetErrorString");
  find(get_last_error, "cudaGetLastError");
}

void CudaCalls::check(int status, const char* call) const {
  if (status == 0) return;
  get_last_error();
  throw std::runtime_error(std::string(call) + ": " + error_string(status));
}

}  // namespace memkernels::runtime
