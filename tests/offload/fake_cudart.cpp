// A CUDA runtime for tests: a stream is a thread, an operation begins when those before it on its stream have ended,
// and takes as long as the fake_ functions say. They also let it forget a wait, and put each operation off until
// somebody waits for it. The operations of the host's stream run on the thread that gives them, before it goes on: what
// a test computes itself is work on that stream.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalid = 1, kMemoryAllocation = 2, kNotReady = 600, kDeviceToHost = 2;

std::mutex& mutex = *new std::mutex;  // of everything below; at the end of the process threads may still wait
std::condition_variable& changed = *new std::condition_variable;
bool lazy = false;
int alive = 0, copies = 0, out_delay = 0, in_delay = 0, fill_delay = 0, random_delay = 0;
int64_t waits = 0, wait_to_forget = -1;
int copy_to_refuse = -1;
bool pins = true;
thread_local int current_device = 0, last_error = kSuccess;
std::mt19937 generator;

class Stream;

struct Record {
  bool done = false;
  Stream* stream = nullptr;
  int64_t number = 0;  // of the operations of its stream
};

struct Wait {
  void *waiting, *recording;  // streams
};
std::vector<Wait> log_of_waits;

struct Event {
  std::shared_ptr<Record> last = std::make_shared<Record>(Record{true});
};

using Lock = std::unique_lock<std::mutex>;

class Stream {
 public:
  explicit Stream(bool of_host) : of_host_(of_host) {
    if (!of_host) thread_ = std::thread([this] { run(); });
  }

  ~Stream() {
    if (of_host_) return;
    {
      const std::lock_guard lock(mutex);
      closing_ = true;
    }
    changed.notify_all();
    thread_.join();
  }

  void add(std::function<void(Lock&)> operation, Record* record = nullptr) {
    Lock lock(mutex);
    ++added_;
    if (record) record->stream = this, record->number = added_;
    if (of_host_) {
      operation(lock);
    } else {
      queue_.push_back(std::move(operation));
    }
    changed.notify_all();
  }

  void demand(int64_t number) {
    demanded_ = std::max(demanded_, number);
    changed.notify_all();
  }

 private:
  void run() {
    Lock lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return closing_ || (!queue_.empty() && (!lazy || executed_ < demanded_)); });
      if (queue_.empty()) return;
      const auto operation = std::move(queue_.front());
      queue_.pop_front();
      ++executed_;
      operation(lock);
      changed.notify_all();
    }
  }

  const bool of_host_;
  int64_t added_ = 0, executed_ = 0, demanded_ = 0;
  std::deque<std::function<void(Lock&)>> queue_;
  bool closing_ = false;
  std::thread thread_;
};

void await(Lock& lock, Record& record) {
  if (!record.done && record.stream) record.stream->demand(record.number);
  changed.wait(lock, [&] { return record.done; });
}

void delay(Lock& lock, int microseconds) {
  if (random_delay) microseconds += static_cast<int>(generator() % random_delay);
  lock.unlock();
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  lock.lock();
}

Stream* as_stream(void* stream) {
  return static_cast<Stream*>(stream);
}

int failed(int status) {
  return last_error = status;
}

int count(int change) {
  const std::lock_guard lock(mutex);
  return alive += change;
}

}  // namespace

extern "C" {

int cudaSetDevice(int device) {
  current_device = device;
  return kSuccess;
}

int cudaGetDevice(int* device) {
  *device = current_device;
  return kSuccess;
}

int cudaStreamCreateWithFlags(void** stream, unsigned) {
  count(1);
  *stream = new Stream(false);
  return kSuccess;
}

int cudaStreamDestroy(void* stream) {
  count(-1);
  delete as_stream(stream);
  return kSuccess;
}

int cudaEventCreateWithFlags(void** event, unsigned) {
  count(1);
  *event = new Event;
  return kSuccess;
}

int cudaEventDestroy(void* event) {
  count(-1);
  delete static_cast<Event*>(event);
  return kSuccess;
}

int cudaEventRecord(void* event, void* stream) {
  const auto record = std::make_shared<Record>();
  {
    const std::lock_guard lock(mutex);
    static_cast<Event*>(event)->last = record;
  }
  as_stream(stream)->add([record](Lock&) { record->done = true; }, record.get());
  return kSuccess;
}

int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
  std::shared_ptr<Record> record;
  {
    const std::lock_guard lock(mutex);
    record = static_cast<Event*>(event)->last;
    log_of_waits.push_back({stream, record->stream});
    if (waits++ == wait_to_forget) return kSuccess;
  }
  as_stream(stream)->add([record](Lock& lock) { await(lock, *record); });
  return kSuccess;
}

int cudaEventQuery(void* event) {
  const std::lock_guard lock(mutex);
  return static_cast<Event*>(event)->last->done ? kSuccess : failed(kNotReady);
}

int cudaEventSynchronize(void* event) {
  Lock lock(mutex);
  await(lock, *std::shared_ptr<Record>(static_cast<Event*>(event)->last));
  return kSuccess;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  if (!to || !from) return failed(kInvalid);
  {
    const std::lock_guard lock(mutex);
    if (copy_to_refuse >= 0 && copy_to_refuse-- == 0) return failed(kInvalid);
    ++copies;
  }
  as_stream(stream)->add([=](Lock& lock) {
    delay(lock, kind == kDeviceToHost ? out_delay : in_delay);
    std::memcpy(to, from, bytes);
  });
  return kSuccess;
}

int cudaHostRegister(void*, size_t, unsigned) {
  if (!pins) return failed(kMemoryAllocation);
  count(1);
  return kSuccess;
}

int cudaHostUnregister(void*) {
  count(-1);
  return kSuccess;
}

const char* cudaGetErrorString(int status) {
  return status == kInvalid ? "invalid argument" : "some error";
}

int cudaGetLastError() {
  return std::exchange(last_error, kSuccess);
}

// Refuses the copy of that number from now on, once; none where it is negative.
void fake_refuse_copy(int number) {
  const std::lock_guard lock(mutex);
  copy_to_refuse = number;
}

// Whether memory can be pinned.
void fake_pins(bool on) {
  pins = on;
}

// What a kernel would do: fills memory when its turn on the stream comes.
void fake_fill(void* to, int value, size_t bytes, void* stream) {
  as_stream(stream)->add([=](Lock& lock) {
    delay(lock, fill_delay);
    std::memset(to, value, bytes);
  });
}

// As a kernel that reads; returns when it has run.
void fake_read(void* to, const void* from, size_t bytes, void* stream) {
  bool done = false;
  as_stream(stream)->add([&](Lock&) {
    std::memcpy(to, from, bytes);
    done = true;
  });
  Lock lock(mutex);
  changed.wait(lock, [&] { return done; });
}

// Microseconds that each copy out, copy in and fill takes, and the most that is added to them at random.
void fake_delay(int out, int in, int fill, int random, unsigned seed) {
  const std::lock_guard lock(mutex);
  out_delay = out, in_delay = in, fill_delay = fill, random_delay = random;
  generator.seed(seed);
}

// From now on operations begin as late as they may.
void fake_lazy(bool on) {
  const std::lock_guard lock(mutex);
  lazy = on;
  changed.notify_all();
}

// How many copies were begun since this was asked last.
int fake_copies() {
  const std::lock_guard lock(mutex);
  return std::exchange(copies, 0);
}

// Forgets the wait of that number from now on; none where it is negative.
void fake_forget_wait(int64_t number) {
  const std::lock_guard lock(mutex);
  waits = 0;
  wait_to_forget = number;
  log_of_waits.clear();
}

// Between which streams the wait of that number was; false where there was none.
bool fake_wait(int64_t number, void** waiting, void** recording) {
  const std::lock_guard lock(mutex);
  if (number >= waits) return false;
  *waiting = log_of_waits[number].waiting, *recording = log_of_waits[number].recording;
  return true;
}

void* fake_host_stream() {
  count(1);
  return new Stream(true);
}

// How many streams, events and registrations there are.
int fake_alive() {
  return count(0);
}
}
