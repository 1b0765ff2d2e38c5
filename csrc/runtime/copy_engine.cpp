#include "runtime/copy_engine.h"

#include <stdexcept>

namespace memkernels::runtime {
namespace {

constexpr int kHostToDevice = 1, kDeviceToHost = 2, kNotReady = 600;  // cudaMemcpyKind, cudaErrorNotReady
constexpr unsigned kNonBlocking = 1, kDisableTiming = 2;              // of cudaStreamCreateWithFlags, of events

class OnDevice {
 public:
  OnDevice(const CudaCalls& cuda, int device) : cuda_(cuda) {
    cuda_.check(cuda_.get_device(&before_), "cudaGetDevice");
    cuda_.check(cuda_.set_device(device), "cudaSetDevice");
  }
  ~OnDevice() { cuda_.set_device(before_); }

 private:
  const CudaCalls& cuda_;
  int before_ = 0;
};

CudaStream as_stream(uintptr_t stream) {
  return reinterpret_cast<CudaStream>(stream);
}

}  // namespace

EventPool::~EventPool() {
  if (in_fork()) return;
  for (const CudaEvent event : events_) cuda->event_destroy(event);
}

CudaEvent EventPool::take() {
  {
    const std::lock_guard lock(mutex_);
    if (!events_.empty()) {
      const CudaEvent event = events_.back();
      events_.pop_back();
      return event;
    }
  }
  const OnDevice current(*cuda, device);
  CudaEvent event;
  cuda->check(cuda->event_create(&event, kDisableTiming), "cudaEventCreateWithFlags");
  return event;
}

void EventPool::give_back(CudaEvent event) {
  if (in_fork()) return;  // the mutex may be held by a thread that is not there
  const std::lock_guard lock(mutex_);
  events_.push_back(event);
}

void EventPool::check_owner() const {
  if (in_fork()) throw std::runtime_error("copies of another process, of which this is a fork.");
}

bool Copy::done() const {
  events_->check_owner();
  const int status = events_->cuda->event_query(event_);
  if (status == kNotReady) {
    events_->cuda->get_last_error();  // which it is to the runtime
    return false;
  }
  events_->cuda->check(status, "cudaEventQuery");
  return true;
}

void Copy::wait() const {
  events_->check_owner();
  events_->cuda->check(events_->cuda->event_synchronize(event_), "cudaEventSynchronize");
}

void Copy::wait_on(uintptr_t stream) const {
  events_->check_owner();
  const OnDevice current(*events_->cuda, events_->device);  // whose default stream is meant where it is that
  events_->cuda->check(events_->cuda->stream_wait_event(as_stream(stream), event_, 0), "cudaStreamWaitEvent");
}

CopyEngine::CopyEngine(std::shared_ptr<const CudaCalls> cuda, int device)
    : events_(std::make_shared<EventPool>(std::move(cuda), device)) {
  const CudaCalls& calls = *events_->cuda;
  const OnDevice current(calls, device);
  calls.check(calls.stream_create(&out_.stream, kNonBlocking), "cudaStreamCreateWithFlags");
  const int status = calls.stream_create(&in_.stream, kNonBlocking);
  if (status != 0) calls.stream_destroy(out_.stream);
  calls.check(status, "cudaStreamCreateWithFlags");
}

CopyEngine::~CopyEngine() {
  if (events_->in_fork()) return;
  for (Direction* direction : {&out_, &in_}) {
    for (const Pending& pending : direction->pending) events_->cuda->event_synchronize(pending.copy->event_);
    direction->pending.clear();
    events_->cuda->stream_destroy(direction->stream);
  }
}

std::shared_ptr<Copy> CopyEngine::out(uintptr_t from, const std::shared_ptr<SlabBlock>& block, uintptr_t stream) {
  return begin(out_, from, block, stream);
}

std::shared_ptr<Copy> CopyEngine::into(uintptr_t to, const std::shared_ptr<SlabBlock>& block, uintptr_t stream) {
  return begin(in_, to, block, stream);
}

std::shared_ptr<Copy> CopyEngine::begin(Direction& direction, uintptr_t address,
                                        const std::shared_ptr<SlabBlock>& block, uintptr_t stream) {
  events_->check_owner();
  const std::lock_guard lock(mutex_);
  reap(direction);
  const CudaCalls& cuda = *events_->cuda;
  const OnDevice current(cuda, events_->device);
  const auto copy = std::make_shared<Copy>(events_);
  // A wait is for the record before it, so one event serves for what the caller's stream was given and for the copy.
  cuda.check(cuda.event_record(copy->event_, as_stream(stream)), "cudaEventRecord");
  cuda.check(cuda.stream_wait_event(direction.stream, copy->event_, 0), "cudaStreamWaitEvent");
  direction.pending.push_back({copy, block});
  int status = 0;
  for (const auto part : block->registered_parts()) {
    const int64_t offset = part.data() - block->data();
    void* device = reinterpret_cast<void*>(address + offset);
    const bool out = &direction == &out_;
    status = cuda.memcpy_async(out ? part.data() : device, out ? device : part.data(), part.size(),
                               out ? kDeviceToHost : kHostToDevice, direction.stream);
    if (status != 0) break;
  }
  const int recorded = cuda.event_record(copy->event_, direction.stream);
  // The parts before the one that failed are under way, and nobody else will wait for them.
  if (status != 0 && recorded == 0) cuda.event_synchronize(copy->event_);
  cuda.check(status, "cudaMemcpyAsync");
  cuda.check(recorded, "cudaEventRecord");
  return copy;
}

void CopyEngine::reap(Direction& direction) {
  while (!direction.pending.empty() && direction.pending.front().copy->done()) direction.pending.pop_front();
}

int64_t CopyEngine::pending() {
  events_->check_owner();
  const std::lock_guard lock(mutex_);
  reap(out_);
  reap(in_);
  return static_cast<int64_t>(out_.pending.size() + in_.pending.size());
}

}  // namespace memkernels::runtime
