// For LD_PRELOAD: copies of 64 KiB and more, in threads other than the first, begin SLOW_MEMCPY microseconds late.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>

extern "C" void* memcpy(void* to, const void* from, size_t bytes) {
  static const char* delay = std::getenv("SLOW_MEMCPY");
  if (delay && bytes >= 64 << 10 && syscall(SYS_gettid) != getpid()) usleep(std::atoi(delay));
  auto* out = static_cast<volatile char*>(to);
  const auto* in = static_cast<const volatile char*>(from);
  for (size_t i = 0; i < bytes; ++i) out[i] = in[i];  // volatile, or it would become a call of itself
  return to;
}
