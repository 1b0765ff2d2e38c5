#pragma once

#include <algorithm>
#include <atomic>

// Relaxed, as on the device: an atomic orders no other memory, so ThreadSanitizer takes none for a barrier.

template <typename T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}

template <typename T>
T atomicMax(T* address, T value) {
  std::atomic_ref<T> target(*address);
  T seen = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(seen, std::max(seen, value), std::memory_order_relaxed)) {
  }
  return seen;
}

template <typename T>
T atomicCAS(T* address, T expected, T value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}

template <typename T>
T atomicExch(T* address, T value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
