// csrc/cuda/optimizer.cuh against plain loops, bit for bit: AdamW with every way to store a parameter or a moment.
#include "cuda/optimizer.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <deque>

#include "check.h"
#include "common/adamw.h"

using namespace memkernels;
using namespace memkernels::cuda;

constexpr AdamW kRule = {.lr = 0.03, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.1};
constexpr float kGradFactor = 0.5f;

uint32_t random_bits(const RandomPlace& place, int64_t index) {
  const int64_t e = place.origin + index;
  uint32_t words[4] = {static_cast<uint32_t>(e / 128 * 16 + e % 16), place.tensor, place.parameter, place.step};
  philox(words, place.seed);
  return words[e % 128 / 32] >> (e / 16 % 2 * 16) & 0xFFFF;
}

// An array of a tensor, with canaries around it, and what it should hold after the step.
template <typename T>
struct Checked {
  Guarded<T> array;
  std::vector<T> expected;

  Checked(int64_t size, int64_t offset) : array(size, offset, T(77)), expected(size) {}
  void set(int64_t i, T value) { array[i] = expected[i] = value; }
  bool right() {
    return array.intact() && std::memcmp(array.data(), expected.data(), expected.size() * sizeof(T)) == 0;
  }
};

// How a parameter or a moment is kept, by plain loops: `load` before the step and `store` what is expected after it.
struct PlainArray {
  Checked<float> data;

  PlainArray(int64_t size, int64_t offset) : data(size, offset) {}
  void fill(int64_t i, float value) { data.set(i, value); }
  void filled(RandomPlace) {}
  float load(int64_t i) { return data.expected[i]; }
  void store(const std::vector<float>& values) { data.expected = values; }
  bool right() { return data.right(); }
  void* address() { return data.array.data(); }
};

struct StochasticArray {
  Checked<uint16_t> data;
  RandomPlace place;

  StochasticArray(int64_t size, int64_t offset) : data(size, offset) {}
  void fill(int64_t i, float value) { data.set(i, bits_as<uint32_t>(value) >> 16); }
  void filled(RandomPlace of) { place = of; }
  float load(int64_t i) { return bits_as<float>(uint32_t{data.expected[i]} << 16); }
  void store(const std::vector<float>& values) {
    for (size_t i = 0; i < values.size(); ++i) {
      data.expected[i] = static_cast<uint16_t>((bits_as<uint32_t>(values[i]) + random_bits(place, i)) >> 16);
    }
  }
  bool right() { return data.right(); }
  void* address() { return data.array.data(); }
};

struct SplitArray {
  Checked<uint16_t> high;
  Checked<int16_t> low;

  SplitArray(int64_t size, int64_t offset) : high(size, offset), low(size, offset + 1) {}
  void fill(int64_t i, float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    high.set(i, static_cast<uint16_t>((bits + 0x8000) >> 16));
    low.set(i, static_cast<int16_t>(bits));
  }
  void filled(RandomPlace) {}
  float load(int64_t i) { return bits_as<float>((uint32_t{high.expected[i]} << 16) + low.expected[i]); }
  void store(const std::vector<float>& values) {
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t bits = bits_as<uint32_t>(values[i]);
      high.expected[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
      low.expected[i] = static_cast<int16_t>(bits);
    }
  }
  bool right() { return high.right() && low.right(); }
  void* address() { return high.array.data(); }
};

template <int kBits, bool kSigned>
struct CodedArray {
  static constexpr int64_t kBlock = kBits == 8 ? kBlock8 : kBlock4, kPerByte = 8 / kBits;
  static constexpr const auto& kCode = kStateCode<kBits, kSigned>;
  int64_t size;
  Checked<uint8_t> codes;
  Checked<float> absmax;

  CodedArray(int64_t size_, int64_t offset)
      : size(size_), codes((size + kPerByte - 1) / kPerByte, offset), absmax((size + kBlock - 1) / kBlock, 1) {}
  void fill(int64_t i, float value) {
    if (i % kBlock == 0) absmax.set(i / kBlock, 0.1f + std::abs(value));
    codes.set(i / kPerByte, static_cast<uint8_t>(i * 97 + i / 7));
  }
  void filled(RandomPlace) {}
  int code(int64_t i) {
    const int byte = codes.expected[i / kPerByte];
    return kBits == 8 ? byte : i % 2 == 0 ? byte >> 4 : byte & 15;
  }
  float load(int64_t i) { return kCode.template decode<OneLane>(code(i)) * absmax.expected[i / kBlock]; }
  void store(const std::vector<float>& values) {
    for (int64_t first = 0; first < size; first += kBlock) {
      const int64_t last = std::min(size, first + kBlock);
      float largest = 0.0f;
      for (int64_t i = first; i < last; ++i) largest = std::max(largest, std::abs(values[i]));
      absmax.expected[first / kBlock] = largest;
      const float inverse = 1.0f / std::max(largest, kLeastAbsmax);
      // Beyond an odd number of values comes the code of 0.
      for (int64_t i = first; i < (last + kPerByte - 1) / kPerByte * kPerByte; ++i) {
        const int number = kCode.template encode<OneLane>(i < last ? values[i] * inverse : 0.0f);
        uint8_t& byte = codes.expected[i / kPerByte];
        byte = static_cast<uint8_t>(kBits == 8 ? number : i % 2 == 0 ? number << 4 : byte | number);
      }
    }
  }
  bool right() { return codes.right() && absmax.right(); }
  void* address() { return codes.array.data(); }
};

template <typename Array>
float* absmax_of(Array& array) {
  if constexpr (requires { array.absmax; }) return array.absmax.array.data();
  return nullptr;
}

template <typename Grad>
Grad grad_from(float value) {
  if constexpr (std::is_same_v<Grad, float>) return value;
  return static_cast<uint16_t>(bits_as<uint32_t>(value) >> 16);
}

// A parameter with all that belongs to it.
template <typename Parameter, typename First, typename Second, typename Grad>
struct Held {
  Parameter parameter;
  First first;
  Second second;
  Guarded<Grad> grad;
  Slot slot;

  Held(int64_t size, int64_t offset, uint32_t index, uint64_t seed)
      : parameter(size, offset), first(size, offset), second(size, offset), grad(size, offset, Grad(77)) {
    slot = {.parameter = parameter.address(),
            .grad = grad.data(),
            .moments = {first.address(), second.address()},
            .absmax = {absmax_of(first), absmax_of(second)},
            .remainder = nullptr,
            .size = size,
            .origin = (absmax_of(first) == nullptr ? 300 : 512) * index,
            .bfloat16 = sizeof(Grad) == 2,
            .index = index,
            .step = 1 + index % 5};
    if constexpr (requires { parameter.low; }) slot.remainder = parameter.low.array.data();
    parameter.filled(random_place(slot, seed, 0));
    first.filled(random_place(slot, seed, 1));
    second.filled(random_place(slot, seed, 2));
    Random random(size + index);
    for (int64_t i = 0; i < size; ++i) {
      parameter.fill(i, static_cast<float>(random()));
      first.fill(i, static_cast<float>(random()));
      second.fill(i, static_cast<float>(random() + 1));
      grad[i] = grad_from<Grad>(static_cast<float>(random()));
    }
  }

  void step() {
    const AdamWUpdate update = kRule.at(slot.step);
    std::vector<float> p, m, v;
    for (int64_t i = 0; i < slot.size; ++i) {
      p.push_back(parameter.load(i));
      m.push_back(first.load(i));
      v.push_back(second.load(i));
      update.apply<OneLane>(p[i], widened(grad[i]) * (-2.0f * kGradFactor), m[i], v[i]);
    }
    parameter.store(p);
    first.store(m);
    second.store(v);
  }
};

template <typename Parameter, typename... Moments, typename Arrays>
void test(const std::string& name, const Arrays& make) {
  using Of = std::remove_reference_t<decltype(make(0, 0, 0))>;
  const Group group = {.slots = {},
                       .state_bits = 0,
                       .seed = 0x123456789,
                       .grad_scale = -2.0f,
                       .grad_factor = &kGradFactor,
                       .lr_factor = nullptr};
  std::deque<Of> held;
  const auto step = [&] {
    std::vector<const Slot*> slots;
    for (Of& one : held) slots.push_back(&one.slot);
    launch_slots<Parameter, Moments...>(slots, group, kRule, nullptr);
    for (Of& one : held) {
      one.step();
      const std::string what = name + ", " + std::to_string(one.slot.size) + " elements of parameter ";
      expect(one.parameter.right(), what + std::to_string(one.slot.index));
      expect(one.first.right(), what + std::to_string(one.slot.index) + ": first moment");
      expect(one.second.right(), what + std::to_string(one.slot.index) + ": second moment");
      expect(one.grad.intact(), what + std::to_string(one.slot.index) + ": gradient");
    }
    held.clear();
  };
  uint32_t index = 0;
  for (int64_t size : {1, 129, 255, 256, 4500}) {
    for (int64_t offset : {0, 1}) held.push_back(make(size, offset, index++));
  }
  step();
  for (int64_t i = 0; i < 35; ++i) held.push_back(make(1 + i % 3, 0, index++));  // two launches
  step();
}

template <typename Parameter, typename First, typename Second, typename Grad>
auto maker() {
  return [](int64_t size, int64_t offset, uint32_t index) {
    return Held<Parameter, First, Second, Grad>(size, offset, index, 0x123456789);
  };
}

// The run that begins 2^32 elements into a parameter: a table that says so of the grid's only block.
void test_offsets_beyond_32_bits() {
  constexpr int64_t kFirst = int64_t{1} << 32, kSize = kFirst + 300;
  const auto reserve = [](size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  void* arrays[4];
  for (void*& array : arrays) array = reserve(kSize * sizeof(float));
  if (!expect(std::find(arrays, arrays + 4, MAP_FAILED) == arrays + 4, "64 GiB of address space")) return;
  SlotTable<AdamWUpdate> table{};
  std::fill(table.first_chunk, table.first_chunk + kSlots, std::numeric_limits<int64_t>::max());
  table.slots[0].parameter = arrays[0];
  table.slots[0].grad = arrays[1];
  table.slots[0].moments[0] = arrays[2];
  table.slots[0].moments[1] = arrays[3];
  table.slots[0].size = kSize;
  table.first_chunk[0] = -kFirst / kChunkElements;
  table.grad_scale = 1.0f;
  table.updates[0] = kRule.at(1);
  auto* parameter = static_cast<float*>(arrays[0]);
  std::fill_n(parameter + kFirst, 300, 1.0f);
  launch(optimizer_kernel<PlainFloat, AdamWUpdate, PlainFloat, PlainFloat>, 1, kOptimizerThreads, nullptr, table);
  const float expected = static_cast<float>(1 - kRule.lr * kRule.weight_decay);
  expect(std::all_of(parameter + kFirst, parameter + kSize, [&](float p) { return p == expected; }),
         "elements from 2^32 on");
  for (void* array : arrays) munmap(array, kSize * sizeof(float));
}

int main() {
  test<SplitFloat, StochasticBFloat16, StochasticBFloat16>(
      "16 bits", maker<SplitArray, StochasticArray, StochasticArray, uint16_t>());
  test<StochasticBFloat16, Codes8<true>, Codes8<false>>(
      "8 bits", maker<StochasticArray, CodedArray<8, true>, CodedArray<8, false>, uint16_t>());
  test<PlainFloat, Codes4<true>, Codes4<false>>("4 bits",
                                                maker<PlainArray, CodedArray<4, true>, CodedArray<4, false>, float>());
  test_offsets_beyond_32_bits();
  return failures > 0;
}
