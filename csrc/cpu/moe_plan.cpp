// The plan of a dispatch to experts: a counting sort of (token, choice) pairs by expert, stable, so that the rows of an
// expert are in the order of the tokens.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/kernel_table.h"
#include "common/moe_tensors.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kPairsPerTask = 8192;

// Calls body(task, begin, end) for parts of the pairs, whose number does not depend on the threads.
template <typename Body>
void for_each_task(int64_t pairs, const Body& body) {
  const int64_t tasks = (pairs + kPairsPerTask - 1) / kPairsPerTask;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      body(task, task * kPairsPerTask, std::min((task + 1) * kPairsPerTask, pairs));
    }
  });
}

template <typename Id>
void plan(const Id* ids, int64_t pairs, int64_t experts, int64_t capacity, int64_t rows, int32_t* row_of_pair,
          int32_t* pair_of_row, int32_t* offsets, int32_t* counts) {
  const int64_t groups = experts + 1;  // the last is that of pairs that go nowhere
  const int64_t tasks = (pairs + kPairsPerTask - 1) / kPairsPerTask;
  std::vector<int32_t> before(tasks * groups, 0);  // first the pairs of each task, then the pairs in earlier tasks
  std::atomic<bool> out_of_range{false};
  for_each_task(pairs, [&](int64_t task, int64_t begin, int64_t end) {
    int32_t* histogram = before.data() + task * groups;
    for (int64_t pair = begin; pair < end; ++pair) {
      if (ids[pair] < 0 || ids[pair] > experts) {
        out_of_range = true;
        return;
      }
      ++histogram[ids[pair]];
    }
  });
  STD_TORCH_CHECK(!out_of_range, "expert_ids: expected 0 to ", experts,
                  " (num_experts: nowhere), got an id out of range");

  std::fill_n(counts, groups, 0);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t group = 0; group < groups; ++group) {
      int32_t& here = before[task * groups + group];
      std::swap(here, counts[group]);
      counts[group] += here;
    }
  }
  offsets[0] = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    offsets[expert + 1] = offsets[expert] + static_cast<int32_t>(std::min<int64_t>(counts[expert], capacity));
  }

  for_each_task(pairs, [&](int64_t task, int64_t begin, int64_t end) {
    int32_t* next = before.data() + task * groups;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t expert = ids[pair];
      const int64_t place = next[expert]++;
      const bool kept = expert < experts && place < capacity;
      row_of_pair[pair] = kept ? static_cast<int32_t>(offsets[expert] + place) : -1;
      if (kept) pair_of_row[row_of_pair[pair]] = static_cast<int32_t>(pair);
    }
  });
  std::fill(pair_of_row + offsets[experts], pair_of_row + rows, -1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_plan(const Tensor& expert_ids_in, int64_t num_experts,
                                                    int64_t capacity) {
  const int64_t rows = check_moe_plan(expert_ids_in, num_experts, capacity);
  const Tensor expert_ids = as_contiguous(expert_ids_in);
  const int64_t pairs = expert_ids.numel();
  Tensor row_of_pair = torch::stable::new_empty(expert_ids, expert_ids.sizes(), ScalarType::Int);
  Tensor pair_of_row = torch::stable::new_empty(expert_ids, {rows}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(expert_ids, {num_experts + 1}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(expert_ids, {num_experts + 1}, ScalarType::Int);
  const auto run = [&](const auto* ids) {
    plan(ids, pairs, num_experts, capacity, rows, row_of_pair.mutable_data_ptr<int32_t>(),
         pair_of_row.mutable_data_ptr<int32_t>(), offsets.mutable_data_ptr<int32_t>(),
         counts.mutable_data_ptr<int32_t>());
  };
  if (expert_ids.scalar_type() == ScalarType::Int) {
    run(expert_ids.const_data_ptr<int32_t>());
  } else {
    run(expert_ids.const_data_ptr<int64_t>());
  }
  return {row_of_pair, pair_of_row, offsets, counts};
}

MEMKERNELS_CPU_KERNEL(moe_plan);

}  // namespace
}  // namespace memkernels::cpu
