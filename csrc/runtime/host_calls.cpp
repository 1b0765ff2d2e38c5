#include "runtime/host_calls.h"

#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "runtime/transfer.h"

namespace memkernels::runtime {
namespace {

constexpr int kNotReady = 600;  // cudaErrorNotReady; other errors are those of errno

class Stream {
 public:
  Stream() : thread_([this] { work(); }) {}
  ~Stream() {  // when all is done
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    given_.notify_one();
    thread_.join();
  }

  void give(std::function<void()> operation) {
    {
      const std::lock_guard lock(mutex_);
      operations_.push_back(std::move(operation));
    }
    given_.notify_one();
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      given_.wait(lock, [this] { return closed_ || !operations_.empty(); });
      if (operations_.empty()) return;
      const auto operation = std::move(operations_.front());
      operations_.pop_front();
      lock.unlock();
      operation();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable given_;
  std::deque<std::function<void()>> operations_;
  bool closed_ = false;
  std::thread thread_;
};

// Done when its last record is.
struct Event {
  std::shared_ptr<Transfer> record = std::make_shared<Transfer>(0);
};

Stream* as_stream(CudaStream stream) {
  return static_cast<Stream*>(stream);
}

Event* as_event(CudaEvent event) {
  return static_cast<Event*>(event);
}

template <typename Call>
int status_of(Call&& call) {
  try {
    call();
    return 0;
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  } catch (const std::system_error& error) {
    return error.code().value();
  }
}

template <typename Operation>
int give(CudaStream stream, Operation&& operation) {
  return status_of([&] { stream ? as_stream(stream)->give(operation) : operation(); });
}

}  // namespace

HostCalls::HostCalls() {
  set_device = [](int) { return 0; };
  get_device = [](int* device) { return *device = 0; };
  stream_create = [](CudaStream* stream, unsigned) { return status_of([=] { *stream = new Stream; }); };
  stream_destroy = [](CudaStream stream) {
    delete as_stream(stream);
    return 0;
  };
  stream_wait_event = [](CudaStream stream, CudaEvent event, unsigned) {
    return give(stream, [record = as_event(event)->record] { record->wait(); });
  };
  event_create = [](CudaEvent* event, unsigned) { return status_of([=] { *event = new Event; }); };
  event_destroy = [](CudaEvent event) {
    delete as_event(event);
    return 0;
  };
  event_record = [](CudaEvent event, CudaStream stream) {
    return status_of([=] {
      const auto record = std::make_shared<Transfer>(1);
      const int status = give(stream, [record] { record->finish_part(); });
      if (status != 0) throw std::system_error(status, std::generic_category());
      as_event(event)->record = record;
    });
  };
  event_query = [](CudaEvent event) { return as_event(event)->record->done() ? 0 : kNotReady; };
  event_synchronize = [](CudaEvent event) {
    as_event(event)->record->wait();
    return 0;
  };
  memcpy_async = [](void* to, const void* from, size_t bytes, int, CudaStream stream) {
    if (!to || !from) return EINVAL;
    return give(stream, [=] { std::memcpy(to, from, bytes); });
  };
  host_register = [](void*, size_t, unsigned) { return 0; };
  host_unregister = [](void*) { return 0; };
  error_string = [](int status) { return static_cast<const char*>(std::strerror(status)); };
  get_last_error = [] { return 0; };
}

}  // namespace memkernels::runtime
