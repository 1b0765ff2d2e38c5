// csrc/cuda/adafactor.cuh against plain loops. Gradients are small integers and factors powers of two, so that sums are
// exact in every order.
#include "cuda/adafactor.cuh"

#include <algorithm>

#include "check.h"

using namespace memkernels;
using namespace memkernels::cuda;

constexpr float kGradFactor = 0.5f;
constexpr float kGradScale = -4.0f;

template <typename T>
T stored(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  return static_cast<T>(bits_as<uint32_t>(value) >> 16);
}

template <typename T>
Guarded<T> integers(int64_t size, int64_t offset) {
  Guarded<T> values(size, offset, stored<T>(77.0f));
  for (int64_t i = 0; i < size; ++i) values[i] = stored<T>(static_cast<float>((i * 37 + i / 5) % 9 - 4));
  return values;
}

template <typename T>
void test_squares(const Matrices& of, int64_t offset) {
  const std::string what = std::to_string(of.count) + " of " + std::to_string(of.rows) + " x " +
                           std::to_string(of.width) + ", " + std::to_string(sizeof(T)) + " bytes: ";
  auto grad = integers<T>(of.count * of.rows * of.width, offset);
  Guarded<float> rows(of.count * of.rows, 1, 77.0f), columns(of.count * of.width, 1, 77.0f);
  const SquareTiles<T> tiles(grad.data(), of, kGradScale, &kGradFactor);
  Guarded<float> row_parts(int64_t{tiles.row_parts} * rows.size(), 0, 77.0f);
  Guarded<float> column_parts(int64_t{tiles.column_parts} * columns.size(), 0, 77.0f);
  if (are_small(tiles)) {
    launch_factored_squares(tiles, rows.data(), columns.data(), nullptr);
  } else {
    const bool one = tiles.row_parts == 1;
    launch_factored_squares(tiles, one ? rows.data() : row_parts.data(), column_parts.data(), nullptr);
    if (!one) launch_part_sums(row_parts.data(), tiles.row_parts, rows.size(), rows.data(), nullptr);
    launch_part_sums(column_parts.data(), tiles.column_parts, columns.size(), columns.data(), nullptr);
  }
  std::vector<float> of_rows(rows.size()), of_columns(columns.size());
  for (int64_t i = 0; i < grad.size(); ++i) {
    const float value = widened(grad[i]) * (kGradScale * kGradFactor);
    of_rows[i / of.width] += value * value;
    of_columns[i / of.width / of.rows * of.width + i % of.width] += value * value;
  }
  expect(std::equal(of_rows.begin(), of_rows.end(), rows.data()) && rows.intact(), what + "rows");
  expect(std::equal(of_columns.begin(), of_columns.end(), columns.data()) && columns.intact(), what + "columns");
  expect(row_parts.intact() && column_parts.intact() && grad.intact(), what + "what lies beside");
}

Guarded<float> powers(int64_t size) {
  Guarded<float> values(size, 0, 77.0f);
  for (int64_t i = 0; i < size; ++i) values[i] = std::exp2f(static_cast<float>(i * 7 % 5 - 2));
  return values;
}

// A step without a moment, of which the sum of squares is made too.
template <typename T>
void test_step(const Matrices& of, int64_t offset) {
  const std::string what = "step, " + std::to_string(of.count) + " of " + std::to_string(of.rows) + " x " +
                           std::to_string(of.width) + ", " + std::to_string(sizeof(T)) + " bytes: ";
  const int64_t size = of.count * of.rows * of.width;
  auto grad = integers<T>(size, offset);
  auto rows = powers(of.count * of.rows), columns = powers(of.count * of.width);
  const Factors factors = {rows.data(), columns.data(), of, 8.0f};
  Guarded<T> parameter(size, offset, stored<T>(77.0f));
  Guarded<int16_t> remainder(size, 1, 77);
  std::vector<float> expected;
  double square = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    parameter[i] = stored<T>(static_cast<float>(i % 16));
    remainder[i] = 0;
    const float factor = rows[i / of.width] * columns[i / of.width / of.rows * of.width + i % of.width];
    const float u = widened(grad[i]) * std::min(factor, 8.0f) * (kGradScale * kGradFactor);
    square += u * u;
    float p = widened(parameter[i]);
    AdafactorUpdate{0.25f, 0.0f, 1.0f}.apply<OneLane>(p, u);
    expected.push_back(p);
  }

  const FactorRuns runs(factors, size, kSummedRuns);
  Guarded<double> sums(factor_blocks(runs), 0, 77.0);
  double result = 0.0;
  launch_factored_square_sum(runs, grad.data(), kGradScale, &kGradFactor, sums.data(), &result, nullptr);
  expect(result == square && sums.intact(), what + "sum of squares");

  const Slot slot = {.parameter = parameter.data(),
                     .grad = grad.data(),
                     .moments = {},
                     .absmax = {},
                     .remainder = sizeof(T) == 2 ? remainder.data() : nullptr,
                     .size = size,
                     .origin = 0,
                     .bfloat16 = sizeof(T) == 2,
                     .index = 0,
                     .step = 1};
  const Group group = {.slots = {slot},
                       .state_bits = 32,
                       .seed = 1,
                       .grad_scale = kGradScale,
                       .grad_factor = &kGradFactor,
                       .lr_factor = nullptr};
  launch_adafactor(group, false, {.lr = 0.5, .beta1 = 0.0, .weight_decay = 0.5}, factors, nullptr);
  bool right = true;
  for (int64_t i = 0; i < size; ++i) {
    float value = widened(parameter[i]);
    if constexpr (sizeof(T) == 2) value = join<OneLane>(parameter[i], static_cast<uint16_t>(remainder[i]));
    right = right && value == expected[i];
  }
  expect(right, what + "parameter");
  expect(parameter.intact() && remainder.intact() && grad.intact(), what + "what lies beside");
}

template <typename T>
void test(int64_t offset) {
  for (const Matrices& of :
       {Matrices{1, 1, 600}, {1, 259, 16}, {2, 40, 33}, {1, 70, 264}, {50, 3, 3}, {2, 1, 1024}, {1, 5, 130}}) {
    test_squares<T>(of, offset);
  }
  for (const Matrices& of : {Matrices{1, 1, 1}, {1, 37, 512}, {2, 33, 256}, {3, 80, 77}, {40, 3, 3}}) {
    test_step<T>(of, offset);
  }
}

// Whatever the dtype and the addresses, threads touch the same: the arguments are dtypes, of which bfloat16 is enough
// to find races.
int main(int count, char** dtypes) {
  for (int i = 1; i < count; ++i) {
    if (std::string(dtypes[i]) == "bfloat16") {
      test<uint16_t>(0);
      continue;
    }
    test<uint16_t>(1);
    for (int64_t offset : {0, 1}) test<float>(offset);
    test_squares<float>({1, 16500, 3}, 0);  // tiles of more rows than warps read at once
  }
  return failures > 0;
}
