// csrc/cuda/moe.cuh against plain loops: the plan exactly, rows to one rounding of their dtype.
#include "cuda/moe.cuh"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "check.h"

using namespace memkernels::cuda;

constexpr int32_t kCanary = 123456789;
constexpr float kFloatCanary = 12345.0f;

struct Case {
  std::string name;
  int64_t tokens, choices, experts, capacity, size;
  int64_t offset = 0;  // of every array of rows, in elements past a 16-byte boundary
  bool one_expert = false;
  bool token_offsets = false;  // tokens of 0 to 3 choices, the last of all that are left, and two choices of none

  int64_t pairs() const { return tokens * choices; }
  int64_t rows() const { return std::min(pairs(), experts * capacity); }
};

struct Plan {
  std::vector<int32_t> row_of_pair, pair_of_row, offsets, counts;
};

// Some go nowhere (experts), and expert 1 gets nothing.
std::vector<int64_t> make_ids(const Case& c) {
  std::vector<int64_t> ids;
  Random random(c.pairs());
  for (int64_t pair = 0; pair < c.pairs(); ++pair) {
    const int64_t id = static_cast<int64_t>((random() + 1) / 2 * (c.experts + 1));
    ids.push_back(c.one_expert ? 0 : id == 1 ? c.experts : id);
  }
  return ids;
}

Plan expected_plan(const Case& c, const std::vector<int64_t>& ids) {
  Plan plan;
  plan.counts.assign(c.experts + 1, 0);
  for (int64_t id : ids) ++plan.counts[id];
  plan.offsets.push_back(0);
  for (int64_t e = 0; e < c.experts; ++e) {
    plan.offsets.push_back(plan.offsets[e] + std::min<int64_t>(plan.counts[e], c.capacity));
  }
  std::vector<int32_t> taken(c.experts + 1, 0);
  plan.pair_of_row.assign(c.rows(), -1);
  for (int64_t pair = 0; pair < c.pairs(); ++pair) {
    const int64_t id = ids[pair];
    const bool kept = id < c.experts && taken[id] < c.capacity;
    plan.row_of_pair.push_back(kept ? plan.offsets[id] + taken[id] : -1);
    if (kept) plan.pair_of_row[plan.row_of_pair.back()] = static_cast<int32_t>(pair);
    ++taken[id];
  }
  return plan;
}

bool same(Guarded<int32_t>& got, const std::vector<int32_t>& expected) {
  return got.intact() && std::equal(expected.begin(), expected.end(), got.data());
}

template <typename Id>
void test_plan(const Case& c) {
  const std::vector<int64_t> wide = make_ids(c);
  const std::vector<Id> ids(wide.begin(), wide.end());
  const Plan expected = expected_plan(c, wide);
  Guarded<int32_t> before(plan_blocks(c.pairs()) * (c.experts + 1), 1, kCanary);
  Guarded<int32_t> row_of_pair(c.pairs(), 2, kCanary), pair_of_row(c.rows(), 3, kCanary);
  Guarded<int32_t> offsets(c.experts + 1, 0, kCanary), counts(c.experts + 1, 1, kCanary);
  launch_moe_plan(ids.data(), c.pairs(), c.experts, c.capacity, c.rows(), before.data(), row_of_pair.data(),
                  pair_of_row.data(), offsets.data(), counts.data(), nullptr);
  expect(before.intact(), c.name + ": scratch");
  expect(same(row_of_pair, expected.row_of_pair), c.name + ": row_of_pair");
  expect(same(pair_of_row, expected.pair_of_row), c.name + ": pair_of_row");
  expect(same(offsets, expected.offsets), c.name + ": offsets");
  expect(same(counts, expected.counts), c.name + ": counts");
}

template <typename T>
std::vector<T> random_rows(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<T> rows;
  for (int64_t i = 0; i < count; ++i) rows.push_back(from_float<T>(static_cast<float>(random())));
  return rows;
}

template <typename T>
struct Rows {
  Guarded<T> data;

  Rows(int64_t count, int64_t offset) : data(count, offset, from_float<T>(kFloatCanary)) {}
  Rows(const std::vector<T>& values, int64_t offset) : Rows(values.size(), offset) {
    std::copy(values.begin(), values.end(), data.data());
  }
  float operator[](int64_t index) { return to_float(data[index]); }
};

template <typename T>
bool operator!=(T a, T b)
  requires(sizeof(T) == 2)
{
  return a.bits != b.bits;
}

// One rounding of T, and what float32 sums of a few terms of order one are off by.
template <typename T>
bool close(float got, double exact) {
  const double ulp = sizeof(T) == 4 ? 0x1p-23 : std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
  return std::abs(got - exact) <= ulp * std::abs(exact) + 1e-5;
}

template <typename T>
void test_rows(const Case& c) {
  const Plan plan = expected_plan(c, make_ids(c));
  const int64_t rows = c.rows(), size = c.size;
  std::vector<int32_t> row_of_pair = plan.row_of_pair, starts = {0};
  for (int64_t token = 0; token < c.tokens; ++token) {
    const int64_t next = c.token_offsets ? starts.back() + token % 4 : (token + 1) * c.choices;
    starts.push_back(static_cast<int32_t>(token + 1 == c.tokens ? c.pairs() : std::min(c.pairs(), next)));
  }
  std::vector<int64_t> token_of_pair;
  for (int64_t token = 0; token < c.tokens; ++token) {
    token_of_pair.insert(token_of_pair.end(), starts[token + 1] - starts[token], token);
  }
  if (c.token_offsets) row_of_pair.insert(row_of_pair.end(), 2, -1);
  const int64_t pairs = row_of_pair.size();
  MoeRows of = {row_of_pair.data(), plan.offsets.data() + c.experts, c.tokens, c.choices, rows, size};
  if (c.token_offsets) of.token_offsets = starts.data(), of.pairs = pairs;
  Rows<T> x(random_rows<T>(c.tokens * size, 1), c.offset), grouped(random_rows<T>(rows * size, 2), c.offset);
  std::vector<float> weights;
  Random random(3);
  for (int64_t pair = 0; pair < pairs; ++pair) weights.push_back(static_cast<float>(random()));

  for (const float* factors : {static_cast<const float*>(nullptr), static_cast<const float*>(weights.data())}) {
    const std::string name = c.name + (factors == nullptr ? "" : ", weighted");
    const auto factor = [&](int64_t pair) { return factors == nullptr ? 1.0f : factors[pair]; };
    Rows<T> dispatched(rows * size, c.offset), combined(c.tokens * size, c.offset);
    launch_moe_dispatch(of, x.data.data(), factors, dispatched.data.data(), nullptr);
    launch_moe_combine(of, grouped.data.data(), factors, combined.data.data(), nullptr);
    bool right = dispatched.data.intact();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t pair = plan.pair_of_row[row];
      for (int64_t i = 0; i < size; ++i) {
        const double exact = pair < 0 ? 0.0 : double{factor(pair)} * x[token_of_pair[pair] * size + i];
        right = right && close<T>(dispatched[row * size + i], exact);
      }
    }
    expect(right, name + ": dispatch");
    right = combined.data.intact();
    for (int64_t token = 0; token < c.tokens; ++token) {
      for (int64_t i = 0; i < size; ++i) {
        double exact = 0;
        for (int64_t pair = starts[token]; pair < starts[token + 1]; ++pair) {
          const int64_t row = row_of_pair[pair];
          if (row >= 0) exact += double{factor(pair)} * grouped[row * size + i];
        }
        right = right && close<T>(combined[token * size + i], exact);
      }
    }
    expect(right, name + ": combine");
  }

  Rows<T> dgrouped(rows * size, c.offset);
  Guarded<float> dweights(pairs, 1, kFloatCanary);
  launch_moe_combine_bwd(of, x.data.data(), grouped.data.data(), weights.data(), dgrouped.data.data(), dweights.data(),
                         nullptr);
  bool right = dgrouped.data.intact() && dweights.intact();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t pair = plan.pair_of_row[row];
    for (int64_t i = 0; i < size; ++i) {
      const double exact = pair < 0 ? 0.0 : double{weights[pair]} * x[token_of_pair[pair] * size + i];
      right = right && close<T>(dgrouped[row * size + i], exact);
    }
  }
  expect(right, c.name + ": gradient of the rows");
  right = true;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t row = row_of_pair[pair];
    double exact = 0;
    for (int64_t i = 0; row >= 0 && i < size; ++i)
      exact += double{x[token_of_pair[pair] * size + i]} * grouped[row * size + i];
    right = right && close<float>(dweights[pair], exact);
  }
  expect(right, c.name + ": gradient of the weights");
}

void test_ids_out_of_range() {
  for (int64_t bad : {int64_t{-1}, int64_t{5}, int64_t{1} << 32, -(int64_t{1} << 40)}) {
    std::vector<int64_t> ids(9, 2);
    ids[7] = bad;
    std::vector<int32_t> before(5), row_of_pair(9), pair_of_row(9), offsets(5), counts(5);
    expect_kernel_error("expert id out of range", [&] {
      launch_moe_plan(ids.data(), 9, 4, 9, 9, before.data(), row_of_pair.data(), pair_of_row.data(), offsets.data(),
                      counts.data(), nullptr);
    });
  }
}

void test_rows_out_of_range() {
  std::vector<float> x(8), grouped(16), weights(4);
  for (int32_t bad : {-2, 4}) {
    const std::vector<int32_t> row_of_pair = {0, 1, 2, bad}, end = {4};
    const MoeRows of = {row_of_pair.data(), end.data(), 2, 2, 4, 4};
    expect_kernel_error("row out of range",
                        [&] { launch_moe_dispatch<float>(of, x.data(), nullptr, grouped.data(), nullptr); });
    expect_kernel_error("row out of range",
                        [&] { launch_moe_combine<float>(of, grouped.data(), nullptr, x.data(), nullptr); });
    expect_kernel_error("row out of range", [&] {
      launch_moe_combine_bwd<float>(of, x.data(), grouped.data(), weights.data(), grouped.data(), weights.data(),
                                    nullptr);
    });
  }
  for (int32_t bad : {-1, 5}) {
    const std::vector<int32_t> row_of_pair = {0, 1, 2, 3}, end = {4}, starts = {0, bad, 4};
    const MoeRows ragged = {row_of_pair.data(), end.data(), 2, 0, 4, 4, starts.data(), 4};
    expect_kernel_error("token_offsets out of range",
                        [&] { launch_moe_dispatch<float>(ragged, x.data(), nullptr, grouped.data(), nullptr); });
    expect_kernel_error("token_offsets out of range",
                        [&] { launch_moe_combine<float>(ragged, grouped.data(), nullptr, x.data(), nullptr); });
    expect_kernel_error("token_offsets out of range", [&] {
      launch_moe_combine_bwd<float>(ragged, x.data(), grouped.data(), weights.data(), grouped.data(), weights.data(),
                                    nullptr);
    });
    const MoeRows of = {row_of_pair.data(), &bad, 2, 2, 4, 4};
    expect_kernel_error("offsets out of range",
                        [&] { launch_moe_dispatch<float>(of, x.data(), nullptr, grouped.data(), nullptr); });
  }
}

void test_order_of_blocks_changes_no_bit() {
  const Case c = {"order", 1200, 2, 7, 1000, 8};
  for (const char* seed : {"1", "2"}) {
    setenv("MEMKERNELS_SIMT_SEED", seed, 1);
    test_plan<int64_t>(c);
  }
  unsetenv("MEMKERNELS_SIMT_SEED");
}

template <typename T>
void test_type() {
  for (Case c : {
           Case{"dropless", 23, 2, 5, 46, 64},
           Case{"capacity", 23, 2, 5, 4, 64},
           Case{"odd rows", 23, 2, 5, 4, 37},
           Case{"between boundaries", 9, 3, 4, 5, 64, 1},
           Case{"long rows", 5, 2, 3, 9, 2056},
           Case{"many choices", 4, 11, 12, 3, 24},
           Case{"token offsets", 23, 2, 5, 4, 64, 0, false, true},
           Case{"one token", 1, 1, 4, 1, 8},
       }) {
    test_rows<T>(c);
  }
}

// Arguments: the dtypes to test.
int main(int argc, char** argv) {
  for (const Case& c : {
           Case{"one pair", 1, 1, 4, 1, 0},
           Case{"dropless", 23, 2, 5, 46, 0},
           Case{"capacity", 23, 2, 5, 4, 0},
           Case{"several blocks", 1301, 2, 9, 2602, 0},
           Case{"several blocks, capacity", 1301, 2, 9, 150, 0},
           Case{"more experts than threads", 300, 3, 601, 2, 0},
           Case{"all to one expert", 700, 2, 5, 900, 0, 0, true},
           Case{"no token", 0, 2, 5, 1, 0},
       }) {
    test_plan<int64_t>(c);
    if (c.pairs() < 100) test_plan<int32_t>(c);
  }
  for (int i = 1; i < argc; ++i) {
    const std::string type = argv[i];
    if (type == "float32") test_type<float>();
    if (type == "float16") test_type<__half>();
    if (type == "bfloat16") test_type<__nv_bfloat16>();
  }
  test_ids_out_of_range();
  test_rows_out_of_range();
  test_order_of_blocks_changes_no_bit();
  return failures > 0;
}
