// Threads that copy, write, read, drop, trim and close at once, for the sanitizers to watch; on the fake CUDA runtime
// of the second argument and on the host's threads, with the file in the folder of the first.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/copy_engine.h"
#include "runtime/host_calls.h"
#include "runtime/pinned_slab.h"
#include "runtime/spill_file.h"

using namespace memkernels::runtime;

namespace {

std::atomic<int> wrong = 0;

void check(const SlabBlock& block, int value) {
  for (int64_t i = 0; i < block.bytes(); i += 997) wrong += block.data()[i] != std::byte(value);
}

struct Device {
  explicit Device(std::shared_ptr<const CudaCalls> calls)
      : cuda(std::move(calls)), slab(std::make_shared<PinnedSlab>(1 << 30, 1 << 20, cuda)) {}

  const std::shared_ptr<const CudaCalls> cuda;
  const std::shared_ptr<PinnedSlab> slab;
  CopyEngine engine{cuda, 0};
};

// Copies memory out, writes it, reads it, and copies it in; now and then whoever waits for it goes on the way.
void turn(Device& device, SpillFile& file, CudaStream stream, unsigned seed) {
  const int64_t bytes = 1 + (seed * 2654435761u) % (6 << 20);
  std::vector<std::byte> memory(bytes, std::byte(seed & 0xff));
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  auto block = device.slab->allocate(bytes);
  auto copy = device.engine.out(address, block, reinterpret_cast<uintptr_t>(stream));
  const auto extent = file.write(block, copy);
  block = nullptr;
  copy->wait();
  if (seed % 5 == 0) return;
  extent->writing->wait();
  const auto back = device.slab->allocate(bytes);
  const auto reading = file.read(extent, back);
  if (seed % 7 == 0) return;
  reading->wait();
  check(*back, seed & 0xff);
  std::fill(memory.begin(), memory.end(), std::byte{});
  copy = device.engine.into(address, back, reinterpret_cast<uintptr_t>(stream));
  if (seed % 3 == 0) copy->wait_on(device.engine.out_stream());
  copy->wait();
  wrong += memory.back() != std::byte(seed & 0xff);
}

// `idle` is a stream that is given nothing else.
void run(std::shared_ptr<const CudaCalls> calls, CudaStream idle, const char* folder, bool io_uring) {
  Device device(std::move(calls));
  auto file = std::make_unique<SpillFile>(folder, 4, io_uring);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      CudaStream stream;
      device.cuda->check(device.cuda->stream_create(&stream, 1), "cudaStreamCreateWithFlags");
      for (int i = 0; i < 25; ++i) {
        turn(device, *file, i % 2 ? stream : idle, 1000 * t + i);
        if (i % 8 == 0) {
          device.slab->trim();
          file->trim();
        }
      }
      device.slab->statistics();
      file->storage().statistics();
      device.engine.pending();
      device.cuda->stream_destroy(stream);
    });
  }
  for (auto& thread : threads) thread.join();
  std::vector<std::shared_ptr<Extent>> extents;
  for (int i = 0; i < 40; ++i) extents.push_back(file->write(device.slab->allocate(1 << 20), nullptr));
  file = nullptr;  // while it writes
  device.engine.pending();
  wrong += device.slab->statistics().in_use != 0;
}

}  // namespace

int main(int, char** arguments) {
  const auto fake = std::make_shared<CudaCalls>(arguments[2]);
  for (const bool io_uring : {true, false}) {
    CudaStream idle;
    fake->check(fake->stream_create(&idle, 1), "cudaStreamCreateWithFlags");
    run(fake, idle, arguments[1], io_uring);
    fake->stream_destroy(idle);
    run(std::make_shared<HostCalls>(), nullptr, arguments[1], io_uring);
  }
  return wrong;
}
