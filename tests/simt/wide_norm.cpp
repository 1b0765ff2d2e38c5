// csrc/cuda/wide_norm.cuh for the sanitizers: what it reads and writes, and nothing else; test_wide_norm.py has the
// values.
#include "cuda/wide_norm.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "check.h"

using namespace memkernels::cuda;

struct Case {
  int64_t rows;
  int size;
  bool centred;
  bool residual;  // and bias
  bool wide;      // parameters of float32
  int64_t teams;
};

bool is_nan(float value) {
  return std::isnan(value);
}

template <typename T>
void fill(Guarded<T>& values, uint64_t seed) {
  Random random(seed);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = from_float<T>(static_cast<float>(random()));
}

// Everything that both kernels write, canaries checked.
struct Written {
  std::vector<float> values;

  template <typename V>
  void add(const std::string& name, Guarded<V>& output) {
    expect(output.intact(), name + ": written beyond its end");
    for (int64_t i = 0; i < output.size(); ++i) values.push_back(to_float(output[i]));
  }
};

bool operator!=(__nv_bfloat16 a, __nv_bfloat16 b) {
  return a.bits != b.bits;
}

template <typename T>
std::vector<float> run(const Case& c) {
  const int64_t elements = c.rows * c.size, sums = c.teams * c.size;
  const T canary = from_float<T>(12345.0f), nan = from_float<T>(NAN);
  const auto array = [&](int64_t size) { return Guarded<T>(size, 0, canary); };
  const auto floats = [](int64_t size) { return Guarded<float>(size, 0, 12345.0f); };
  Guarded<T> x = array(elements), residual = array(elements), dy = array(elements), narrow = array(c.size);
  Guarded<float> wide = floats(c.size);
  fill(x, 1), fill(residual, 2), fill(dy, 3), fill(narrow, 4), fill(wide, 5);
  Guarded<T> y = array(elements), h = array(c.residual ? elements : 0), dx = array(elements);
  Guarded<float> mean = floats(c.centred ? c.rows : 0), rstd = floats(c.rows);
  Guarded<float> dweight = floats(sums), dbias = floats(c.centred ? sums : 0);
  for (Guarded<T>* output : {&y, &h, &dx}) std::fill_n(output->data(), output->size(), nan);
  for (Guarded<float>* output : {&mean, &rstd, &dweight, &dbias}) std::fill_n(output->data(), output->size(), NAN);

  std::vector<unsigned long long> words(team_words(c.teams, norm_blocks(c.size)), 0), words_of_backward = words;
  const NormParameter<T> weight = {c.wide ? nullptr : narrow.data(), c.wide ? wide.data() : nullptr};
  const bool bias = c.centred && c.residual;
  const WideNormFwd<T> forward = {
      .x = x.data(),
      .residual = c.residual ? residual.data() : nullptr,
      .weight = weight,
      .bias = bias ? weight : NormParameter<T>{nullptr, nullptr},
      .y = y.data(),
      .residual_out = h.data(),
      .mean = mean.data(),
      .rstd = rstd.data(),
      .words = words.data(),
      .rows = c.rows,
      .size = c.size,
      .eps = 1e-5f,
      .weight_offset = 1.0f,
  };
  launch_wide_norm_fwd(forward, c.centred, c.teams, nullptr);
  const WideNormBwd<T> backward = {
      .dy = dy.data(),
      .dresidual_out = forward.residual,
      .h = c.residual ? h.data() : x.data(),
      .weight = weight,
      .mean = mean.data(),
      .rstd = rstd.data(),
      .dx = dx.data(),
      .dweight = dweight.data(),
      .dbias = c.centred ? dbias.data() : nullptr,
      .words = words_of_backward.data(),
      .rows = c.rows,
      .size = c.size,
      .weight_offset = 1.0f,
  };
  launch_wide_norm_bwd(backward, c.centred, c.teams, nullptr);

  Written written;
  written.add("y", y), written.add("residual_out", h), written.add("mean", mean), written.add("rstd", rstd);
  written.add("dx", dx), written.add("dweight", dweight), written.add("dbias", dbias);
  const std::string name = std::to_string(c.rows) + " rows of " + std::to_string(c.size);
  expect(std::none_of(written.values.begin(), written.values.end(), is_nan), name + ": all outputs are written");
  return written.values;
}

template <typename T>
void test() {
  // Whole packs and single elements, as many as there are and fewer; teams of one block and of several, of which the
  // last has fewer columns; blocks without rows.
  for (const Case& c : {Case{3, 16384, true, true, false, 2}, Case{2, 16383, true, true, true, 1},
                        Case{2, 5001, false, true, false, 3}, Case{0, 24, true, false, true, 2},
                        Case{2, 16392, true, true, false, 1}, Case{1, 16385, false, true, true, 1}}) {
    run<T>(c);
  }
}

void test_order_of_blocks_changes_no_bit() {
  const Case c = {5, 264, true, true, false, 3};
  setenv("MEMKERNELS_SIMT_SEED", "1", 1);
  const std::vector<float> first = run<__nv_bfloat16>(c);
  setenv("MEMKERNELS_SIMT_SEED", "2", 1);
  const std::vector<float> second = run<__nv_bfloat16>(c);
  unsetenv("MEMKERNELS_SIMT_SEED");
  expect(first == second, "the order of blocks changes no bit");
}

// The last row alone, as the last block of a grid of as many as there are rows has it.
__global__ void last_row_kernel(const WideNormFwd<__nv_bfloat16> forward, const WideNormBwd<__nv_bfloat16> backward) {
  blockIdx.x = static_cast<unsigned int>(forward.rows - 1);
  wide_norm_fwd_kernel<__nv_bfloat16, 8, true>(forward);
  __syncthreads();  // the first thread wrote the statistics
  wide_norm_bwd_kernel<__nv_bfloat16, 8, true>(backward);
  blockIdx.x = 0;
}

void test_offsets_beyond_32_bits() {
  constexpr int kSize = 16384;
  constexpr int64_t kRows = (int64_t{1} << 31) / kSize + 2, kLast = (kRows - 1) * kSize;
  const auto reserve = [](int64_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  std::vector<__nv_bfloat16*> arrays;
  for (int i = 0; i < 4; ++i) {
    void* memory = reserve(kRows * kSize * sizeof(__nv_bfloat16));
    if (!expect(memory != MAP_FAILED, "4 GiB of address space")) return;
    arrays.push_back(static_cast<__nv_bfloat16*>(memory));
  }
  void* sums = reserve(kRows * kSize * sizeof(float));
  if (!expect(sums != MAP_FAILED, "8 GiB of address space")) return;
  auto [x, dy, y, dx] = std::tuple(arrays[0], arrays[1], arrays[2], arrays[3]);
  for (int i = 0; i < kSize; ++i) {
    x[kLast + i] = from_float<__nv_bfloat16>(i % 2 == 0 ? 1.0f : -1.0f);
    dy[kLast + i] = from_float<__nv_bfloat16>(i < 2 ? 1.0f : 0.0f);
  }
  std::vector<float> weight(kSize, 2.0f), mean(kRows), rstd(kRows);
  const NormParameter<__nv_bfloat16> parameter = {nullptr, weight.data()}, none = {nullptr, nullptr};
  const WideNormFwd<__nv_bfloat16> forward = {x,           nullptr, parameter, none,  y,    nullptr, mean.data(),
                                              rstd.data(), nullptr, kRows,     kSize, 0.0f, 0.0f};
  float* dweight = static_cast<float*>(sums);
  const WideNormBwd<__nv_bfloat16> backward = {dy,      nullptr, x,       parameter, mean.data(), rstd.data(), dx,
                                               dweight, nullptr, nullptr, kRows,     kSize,       0.0f};
  launch_with_shared(last_row_kernel, 1, kNormThreads, norm_shared_bytes<__nv_bfloat16>(0, kSize), nullptr, forward,
                     backward);
  expect(to_float(y[kLast]) == 2.0f && to_float(y[kLast + 1]) == -2.0f && rstd[kRows - 1] == 1.0f,
         "the output of a row 2^31 elements away");
  expect(to_float(dx[kLast]) == 2.0f && dweight[kLast + 1] == -1.0f && to_float(y[0]) == 0.0f && dweight[1] == 0.0f,
         "the gradients of a row 2^31 elements away");
  for (__nv_bfloat16* array : arrays) munmap(array, kRows * kSize * sizeof(__nv_bfloat16));
  munmap(sums, kRows * kSize * sizeof(float));
}

// Arguments: the dtypes to test.
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string type = argv[i];
    if (type == "float32") test<float>();
    if (type == "bfloat16") test<__nv_bfloat16>();
  }
  test_order_of_blocks_changes_no_bit();
  test_offsets_beyond_32_bits();
  return failures > 0;
}
