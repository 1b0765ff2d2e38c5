#include "runtime/uring.h"

#if defined(MEMKERNELS_LIBURING)
  #include <liburing.h>
#endif

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

namespace memkernels::runtime {

#if defined(MEMKERNELS_LIBURING)
namespace {

constexpr int kDepth = 2;  // parts of one thread under way at once; few, since they wait while it computes a checksum

class Ring {
 public:
  Ring() {
    const int status = io_uring_queue_init(kDepth, &ring_, 0);
    if (status < 0) throw std::system_error(-status, std::generic_category());
  }
  ~Ring() { io_uring_queue_exit(&ring_); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Throws where the system lets a process make a ring and not enter it.
  void try_to_enter() {
    io_uring_prep_nop(io_uring_get_sqe(&ring_));
    int status;
    while ((status = io_uring_submit_and_wait(&ring_, 1)) == -EINTR) {
    }
    if (status < 0) throw std::system_error(-status, std::generic_category());
    io_uring_cq_advance(&ring_, 1);
  }

  bool moves_bytes() {  // from Linux 5.6 on
    const std::unique_ptr<io_uring_probe, void (*)(io_uring_probe*)> probe(io_uring_get_probe_ring(&ring_),
                                                                           io_uring_free_probe);
    return probe && io_uring_opcode_supported(probe.get(), IORING_OP_READ) &&
           io_uring_opcode_supported(probe.get(), IORING_OP_WRITE);
  }

  // No more than kDepth at once.
  void start(std::unique_ptr<IoJob> job) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    const bool reads = job->kind == IoJob::Kind::kRead;
    io_uring_prep_rw(reads ? IORING_OP_READ : IORING_OP_WRITE, entry, job->descriptor(), job->data(), job->left(),
                     job->offset());
    io_uring_sqe_set_data(entry, job.release());
    io_uring_submit(&ring_);  // what the kernel does not take now goes with `wait`
  }

  // A job whose bytes were moved, or some of them: `count`, as `IoJob::moved` has it.
  std::unique_ptr<IoJob> wait(int64_t& count) {
    io_uring_cqe* entry;
    while (io_uring_peek_cqe(&ring_, &entry) != 0) {
      // Where the kernel has no memory for what it is to take, it does not wait for what it has either.
      if (io_uring_submit_and_wait(&ring_, 1) < 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::unique_ptr<IoJob> job(static_cast<IoJob*>(io_uring_cqe_get_data(entry)));
    count = entry->res;
    io_uring_cqe_seen(&ring_, entry);
    return job;
  }

 private:
  io_uring ring_;
};

// Begins the next job, waiting for one where there must be; whether there is one.
bool start_next(Ring& ring, IoQueue& queue, bool wait) {
  while (auto job = queue.take(wait)) {
    try {
      job->begin();
    } catch (...) {
      IoJob::finish(std::move(job), std::current_exception());
      continue;
    }
    ring.start(std::move(job));
    return true;
  }
  return false;
}

void work(Ring& ring, IoQueue& queue) {
  int under_way = 0;
  while (true) {
    while (under_way < kDepth && start_next(ring, queue, under_way == 0)) ++under_way;
    if (under_way == 0) return;
    int64_t count;
    auto job = ring.wait(count);
    std::exception_ptr error;
    try {
      job->moved(count);
      if (job->left() > 0) {
        ring.start(std::move(job));
        continue;
      }
      job->end();
    } catch (...) {
      error = std::current_exception();
    }
    --under_way;
    IoJob::finish(std::move(job), std::move(error));
  }
}

}  // namespace

std::optional<std::string> io_uring_missing() {
  try {
    Ring ring;
    ring.try_to_enter();
    if (ring.moves_bytes()) return std::nullopt;
    return "this kernel's io_uring neither reads nor writes";
  } catch (const std::system_error& e) {
    return "the kernel refuses io_uring: " + std::string(std::strerror(e.code().value()));
  }
}

std::vector<IoWorker> uring_workers(int threads) {
  if (io_uring_missing()) return {};
  std::vector<IoWorker> workers;
  try {
    for (int i = 0; i < threads; ++i) {
      workers.push_back([ring = std::make_shared<Ring>()](IoQueue& queue) { work(*ring, queue); });
    }
  } catch (const std::system_error&) {  // the process may have no more files, or locked memory
    return {};
  }
  return workers;
}

#else

std::optional<std::string> io_uring_missing() {
  return "built without liburing";
}

std::vector<IoWorker> uring_workers(int) {
  return {};
}

#endif

}  // namespace memkernels::runtime
