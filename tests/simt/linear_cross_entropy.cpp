// csrc/cuda/linear_cross_entropy.cuh against plain loops in double. Tolerance: at most twice the error of the same
// loops in float, results rounded to the dtype of the logits, plus the terms stated in `test`.
#include "cuda/linear_cross_entropy.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "check.h"

using namespace memkernels::cuda;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kCanary = 12345.0f;

struct Case {
  std::string name;
  int64_t rows;
  std::vector<int64_t> tiles;  // columns of each
  int64_t padding = 0;         // of a row, in elements
  int64_t offset = 0;          // of the first row, in elements past a 16-byte boundary
  float softcap = 0.0f;
  float label_smoothing = 0.0f;
  float z_loss = 0.0f;
  int64_t ignore_index = -100;
  bool infinities = false;  // some logits -inf: single ones, a whole first tile in row 0, the whole row 1

  int64_t vocab() const {
    int64_t sum = 0;
    for (int64_t cols : tiles) sum += cols;
    return sum;
  }
};

struct Problem {
  std::vector<double> logits;  // [rows, vocab], values of the dtype
  std::vector<int64_t> target;
  std::vector<float> grad_loss;
};

struct Result {
  std::vector<double> lse, loss, grad;
};

template <typename Real>
Result reference(const Case& c, const Problem& problem) {
  const int64_t vocab = c.vocab();
  Result result;
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t label = problem.target[row];
    std::vector<Real> z(vocab), slope(vocab);
    Real max = -kInfinity, sum = 0, logit_sum = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      const Real x = static_cast<Real>(problem.logits[row * vocab + v]);
      const Real tanh = c.softcap > 0 ? std::tanh(x / static_cast<Real>(c.softcap)) : Real{0};
      z[v] = c.softcap > 0 ? static_cast<Real>(c.softcap) * tanh : x;
      slope[v] = 1 - tanh * tanh;
      max = std::max(max, z[v]);
      logit_sum += z[v];
    }
    for (Real value : z) sum += value == -kInfinity ? Real{0} : std::exp(value - max);
    const Real lse = max + std::log(sum);
    const Real smoothing = static_cast<Real>(c.label_smoothing);
    const Real z_loss = static_cast<Real>(c.z_loss);
    const bool ignored = label == c.ignore_index;
    Real loss = 0;
    if (!ignored) {
      loss = lse - (1 - smoothing) * z[label] + z_loss * lse * lse;
      if (smoothing > 0) loss -= smoothing / vocab * logit_sum;
    }
    result.lse.push_back(lse);
    result.loss.push_back(loss);
    for (int64_t v = 0; v < vocab; ++v) {
      const Real p = z[v] == -kInfinity ? Real{0} : (1 + 2 * z_loss * lse) * std::exp(z[v] - lse);
      const Real dz = p - (v == label ? 1 - smoothing : Real{0}) - smoothing / vocab;
      result.grad.push_back(ignored ? Real{0} : static_cast<Real>(problem.grad_loss[row]) * dz * slope[v]);
    }
  }
  return result;
}

template <typename T>
double rounded(double value) {
  return to_float(from_float<T>(static_cast<float>(value)));
}

template <typename T>
Problem make_problem(const Case& c) {
  Random random(c.vocab());
  const int64_t vocab = c.vocab();
  Problem problem;
  for (int64_t i = 0; i < c.rows * vocab; ++i) problem.logits.push_back(rounded<T>(6 * random()));
  for (int64_t row = 0; row < c.rows; ++row) {
    problem.target.push_back(row % 3 == 2 ? c.ignore_index : (row * 7919 + vocab - 1) % vocab);
    problem.grad_loss.push_back(static_cast<float>(random()));
    if (!c.infinities) continue;
    for (int64_t v = row; v < vocab; v += 5) problem.logits[row * vocab + v] = -kInfinity;
    for (int64_t v = 0; row == 0 && v < c.tiles[0]; ++v) problem.logits[v] = -kInfinity;
    for (int64_t v = 0; row == 1 && v < vocab; ++v) problem.logits[vocab + v] = -kInfinity;
  }
  return problem;
}

// What the launchers give, tile by tile, with everything around their outputs checked for stray writes.
template <typename T>
Result run(const Case& c, const Problem& problem) {
  const int64_t vocab = c.vocab();
  Guarded<float> row_max(c.rows, 1, kCanary), row_sum(c.rows, 2, kCanary), target_logit(c.rows, 3, kCanary),
      logit_sum(c.rows, 0, kCanary);
  for (int64_t row = 0; row < c.rows; ++row) {
    row_max[row] = -INFINITY;
    row_sum[row] = logit_sum[row] = 0.0f;
    target_logit[row] = NAN;
  }

  std::vector<std::vector<T>> tiles;
  const T canary = from_float<T>(kCanary);
  const auto at = [&](int64_t tile, int64_t row) { return c.offset + 64 + row * (c.tiles[tile] + c.padding); };
  int64_t start = 0;
  for (int64_t tile = 0; tile < static_cast<int64_t>(c.tiles.size()); ++tile) {
    const int64_t cols = c.tiles[tile];
    tiles.emplace_back(at(tile, c.rows) + 64, canary);
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t v = 0; v < cols; ++v) {
        tiles[tile][at(tile, row) + v] = from_float<T>(static_cast<float>(problem.logits[row * vocab + start + v]));
      }
    }
    const std::vector<T> before = tiles[tile];
    launch_cross_entropy_stats<T>(&tiles[tile][at(tile, 0)], cols + c.padding, problem.target.data(), c.rows, cols,
                                  start, vocab, c.ignore_index, c.softcap, row_max.data(), row_sum.data(),
                                  target_logit.data(), logit_sum.data(), nullptr);
    expect(std::memcmp(before.data(), tiles[tile].data(), before.size() * sizeof(T)) == 0, c.name + ": stats writes");
    start += cols;
  }
  expect(row_max.intact() && row_sum.intact() && target_logit.intact() && logit_sum.intact(), c.name + ": canaries");

  Result result;
  for (int64_t row = 0; row < c.rows; ++row) {
    const float lse = row_max[row] + std::log(row_sum[row]);
    result.lse.push_back(lse);
    const bool ignored = problem.target[row] == c.ignore_index;
    expect(ignored == std::isnan(target_logit[row]), c.name + ": target_logit is written once its tile comes");
    float loss = lse - (1 - c.label_smoothing) * target_logit[row] + c.z_loss * lse * lse;
    if (c.label_smoothing > 0) loss -= c.label_smoothing / vocab * logit_sum[row];
    result.loss.push_back(ignored ? 0.0f : loss);
  }

  result.grad.resize(c.rows * vocab);
  start = 0;
  for (int64_t tile = 0; tile < static_cast<int64_t>(c.tiles.size()); ++tile) {
    const int64_t cols = c.tiles[tile];
    std::vector<T>& data = tiles[tile];
    launch_cross_entropy_grad<T>(&data[at(tile, 0)], cols + c.padding, problem.target.data(), c.rows, cols, start,
                                 vocab, row_max.data(), row_sum.data(), problem.grad_loss.data(), c.ignore_index,
                                 c.softcap, c.label_smoothing, c.z_loss, nullptr);
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t v = 0; v < cols; ++v) {
        result.grad[row * vocab + start + v] = to_float(data[at(tile, row) + v]);
        data[at(tile, row) + v] = canary;
      }
    }
    const bool intact = std::all_of(data.begin(), data.end(), [&](T x) { return to_float(x) == to_float(canary); });
    expect(intact, c.name + ": grad writes outside its tile");
    start += cols;
  }
  return result;
}

// Infinities and NaN have to agree; any other value may err twice as much as `plain` does, plus rtol and atol.
void compare(const std::string& name, const std::vector<double>& got, const std::vector<double>& exact,
             const std::vector<double>& plain, double rtol, double atol) {
  for (size_t i = 0; i < exact.size(); ++i) {
    const bool same = std::isnan(exact[i]) ? std::isnan(got[i]) : got[i] == exact[i];
    const double bound = 2 * std::abs(plain[i] - exact[i]) + rtol * std::abs(exact[i]) + atol;
    const bool close = std::isfinite(exact[i]) && std::abs(got[i] - exact[i]) <= bound;
    char text[200];
    std::snprintf(text, sizeof(text), " at %zu: %.9g, exact %.9g, plain float %.9g", i, got[i], exact[i], plain[i]);
    if (!expect(same || close, name + text)) return;
  }
}

template <typename T>
void test(const Case& c) {
  const Problem problem = make_problem<T>(c);
  const Result exact = reference<double>(c, problem);
  Result plain = reference<float>(c, problem);
  for (double& value : plain.grad) value = rounded<T>(value);
  const Result got = run<T>(c, problem);
  // Sums of thousands of terms of size 1 in lse; one unit in the last place of the dtype in the gradient.
  const double ulp = std::is_same_v<T, float> ? 0x1p-23 : std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;
  compare(c.name + " lse", got.lse, exact.lse, plain.lse, 0, 1e-6);
  compare(c.name + " loss", got.loss, exact.loss, plain.loss, 0, 1e-6);
  compare(c.name + " grad", got.grad, exact.grad, plain.grad, ulp, 1e-7);
}

template <typename T>
std::vector<Case> cases(const std::string& type) {
  const int64_t large = sizeof(T) == 2 ? 8200 : 8193;
  std::vector<Case> list = {
      {.name = "one column", .rows = 5, .tiles = {1}},
      {.name = "three columns", .rows = 5, .tiles = {3}, .padding = 2, .offset = 1},
      {.name = "63 columns in three tiles",
       .rows = 6,
       .tiles = {20, 1, 42},
       .padding = 3,
       .offset = 3,
       .z_loss = 0.01f},
      {.name = "1000 columns", .rows = 4, .tiles = {1000}, .softcap = 4.0f, .label_smoothing = 0.1f, .z_loss = 0.01f},
      {.name = "1000 columns in two tiles, ids ignored",
       .rows = 5,
       .tiles = {488, 512},
       .offset = 5,
       .ignore_index = 3},
      {.name = "4099 columns", .rows = 3, .tiles = {4099}, .padding = 1, .offset = 7, .label_smoothing = 0.2f},
      {.name = "4099 columns in tiles",
       .rows = 3,
       .tiles = {1025, 3000, 74},
       .softcap = 3.0f,
       .label_smoothing = 0.3f,
       .z_loss = 0.001f},
      {.name = "long rows", .rows = 3, .tiles = {large, 5}, .padding = 9, .offset = 2, .z_loss = 0.001f},
      {.name = "-inf, one warp", .rows = 5, .tiles = {31, 64}, .padding = 1, .z_loss = 0.01f, .infinities = true},
      {.name = "-inf, block", .rows = 4, .tiles = {1030, 64}, .label_smoothing = 0.1f, .infinities = true},
      {.name = "-inf, softcap", .rows = 4, .tiles = {40, 23}, .softcap = 2.0f, .z_loss = 0.1f, .infinities = true},
  };
  for (Case& c : list) c.name = type + ", " + c.name;
  return list;
}

// The oracle's gradient is the slope of its loss.
void test_oracle() {
  const Case c = {.name = "oracle", .rows = 3, .tiles = {7}, .softcap = 5, .label_smoothing = 0.1f, .z_loss = 0.05f};
  Problem problem = make_problem<float>(c);
  const Result result = reference<double>(c, problem);
  constexpr double kStep = 1e-5;
  for (int64_t i = 0; i < c.rows * 7; ++i) {
    const double x = problem.logits[i];
    problem.logits[i] = x + kStep;
    const double above = reference<double>(c, problem).loss[i / 7];
    problem.logits[i] = x - kStep;
    const double below = reference<double>(c, problem).loss[i / 7];
    problem.logits[i] = x;
    const double slope = problem.grad_loss[i / 7] * (above - below) / (2 * kStep);
    expect(std::abs(slope - result.grad[i]) < 1e-8, "gradient of the oracle");
  }
}

void test_order_of_blocks_changes_no_bit() {
  const Case c = {.name = "order", .rows = 7, .tiles = {1030, 200}, .padding = 3, .label_smoothing = 0.1f};
  const Problem problem = make_problem<__nv_bfloat16>(c);
  setenv("MEMKERNELS_SIMT_SEED", "1", 1);
  const Result first = run<__nv_bfloat16>(c, problem);
  setenv("MEMKERNELS_SIMT_SEED", "2", 1);
  const Result second = run<__nv_bfloat16>(c, problem);
  unsetenv("MEMKERNELS_SIMT_SEED");
  expect(first.loss == second.loss && first.grad == second.grad, "the order of blocks changes no bit");
}

struct OneRow {
  std::vector<float> logits = std::vector<float>(40, 0.5f);
  int64_t target = 0;
  float row_max = -INFINITY, row_sum = 0.0f, target_logit = NAN, logit_sum = 0.0f, grad_loss = 1.0f;

  void stats(int64_t rows = 1) {
    launch_cross_entropy_stats<float>(logits.data(), 20, &target, rows, 20, 20, 40, -100, 0.0f, &row_max, &row_sum,
                                      &target_logit, &logit_sum, nullptr);
  }
  void grad(int64_t rows = 1) {
    launch_cross_entropy_grad<float>(logits.data(), 20, &target, rows, 20, 20, 40, &row_max, &row_sum, &grad_loss, -100,
                                     0.0f, 0.0f, 0.0f, nullptr);
  }
};

void test_labels_out_of_range() {
  for (int64_t label : {int64_t{-1}, int64_t{40}, int64_t{-101}, std::numeric_limits<int64_t>::max()}) {
    OneRow row{.target = label};
    expect_kernel_error("target out of range", [&] { row.stats(); });
    expect_kernel_error("target out of range", [&] { row.grad(); });
  }
  for (int64_t label : {0, 39, -100}) {
    OneRow row{.target = label};
    expect(kernel_error([&] { row.stats(), row.grad(); }) == "", "label " + std::to_string(label) + " is accepted");
  }
}

void test_no_rows() {
  OneRow row{.target = 1000};
  row.stats(0);
  row.grad(0);
  expect(row.row_max == -INFINITY && row.logits[0] == 0.5f, "no rows, nothing done");
}

void test_nan_logit_shows() {
  OneRow row;
  row.logits[7] = NAN;
  row.stats();
  expect(std::isnan(row.row_max + std::log(row.row_sum)), "a NaN logit makes lse NaN");
}

void test_offsets_beyond_32_bits() {
  constexpr int64_t kStride = (int64_t{1} << 31) + 3, kCols = 21;
  const size_t bytes = (kStride + kCols) * sizeof(__half);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!expect(memory != MAP_FAILED, "4 GiB of address space")) return;
  __half* logits = static_cast<__half*>(memory);
  const int64_t target[2] = {0, 20};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, target_logit[2], logit_sum[2] = {};
  for (int64_t i = 0; i < kCols; ++i) logits[kStride + i] = from_float<__half>(static_cast<float>(i));
  launch_cross_entropy_stats<__half>(logits, kStride, target, 2, kCols, 0, kCols, -100, 0.0f, row_max, row_sum,
                                     target_logit, logit_sum, nullptr);
  expect(row_max[0] == 0.0f && row_max[1] == 20.0f && target_logit[1] == 20.0f && logit_sum[1] == 210.0f,
         "a row 2^31 elements away");
  const float at_most[2] = {0.0f, 20.0f}, sums[2] = {1.0f, 1.0f}, grad_loss[2] = {1.0f, 1.0f};
  launch_cross_entropy_grad<__half>(logits, kStride, target, 2, kCols, 0, kCols, at_most, sums, grad_loss, -100, 0.0f,
                                    0.0f, 0.0f, nullptr);
  expect(to_float(logits[0]) == 0.0f && to_float(logits[1]) == 1.0f && to_float(logits[kStride + 20]) == 0.0f &&
             std::abs(to_float(logits[kStride + 19]) - std::exp(-1.0f)) < 1e-3f,
         "the gradient of a row 2^31 elements away");
  munmap(memory, bytes);
}

// Arguments: the dtypes to test.
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string type = argv[i];
    if (type == "float32")
      for (const Case& c : cases<float>(type)) test<float>(c);
    if (type == "float16")
      for (const Case& c : cases<__half>(type)) test<__half>(c);
    if (type == "bfloat16")
      for (const Case& c : cases<__nv_bfloat16>(type)) test<__nv_bfloat16>(c);
  }
  test_oracle();
  test_order_of_blocks_changes_no_bit();
  test_labels_out_of_range();
  test_no_rows();
  test_nan_logit_shows();
  test_offsets_beyond_32_bits();
  return failures > 0;
}
