// csrc/common/cuda_team.cuh: many sums one after another, of teams that run at once.
#include "check.h"
#include "common/cuda_launch.cuh"
#include "common/cuda_team.cuh"

using namespace memkernels::cuda;

constexpr int kThreads = 64;
constexpr int kSums = 20;

struct Pair {
  float first, second;
};

struct AddPairs {
  Pair operator()(Pair a, Pair b) const { return {a.first + b.first, a.second + b.second}; }
};

// Threads give small integers, whose sums are exact; each writes what it gets.
__global__ void team_sums_kernel(unsigned long long* words, float* results) {
  const TeamSums<kThreads> team_sum(words);
  const int block = static_cast<int>(blockIdx.x * gridDim.y + blockIdx.y);
  for (int i = 0; i < kSums; ++i) {
    const float value = static_cast<float>((threadIdx.x + block + i) % 7);
    float* result = results + ((int64_t{block} * kSums + i) * kThreads + threadIdx.x) * 2;
    if (i % 3 == 0) {
      result[0] = team_sum(i + 1, value, Sum());
      result[1] = 0.0f;
    } else {
      const Pair sums = team_sum(i + 1, Pair{value, 2 * value + 1}, AddPairs());
      result[0] = sums.first, result[1] = sums.second;
    }
  }
}

void test_team_sums(int teams, int blocks) {
  std::vector<unsigned long long> words(team_words(teams, blocks), 0);
  std::vector<float> results(int64_t{teams} * blocks * kSums * kThreads * 2);
  launch_teams(team_sums_kernel, teams, blocks, kThreads, 0, nullptr, words.data(), results.data());
  const std::string name = std::to_string(teams) + " teams of " + std::to_string(blocks);
  for (int64_t at = 0; at < static_cast<int64_t>(results.size()) / 2; ++at) {
    const int64_t i = at / kThreads % kSums, team = at / kThreads / kSums / blocks;
    float sum = 0.0f;
    for (int64_t block = team * blocks; block < (team + 1) * blocks; ++block) {
      for (int thread = 0; thread < kThreads; ++thread) sum += static_cast<float>((thread + block + i) % 7);
    }
    const float second = i % 3 == 0 ? 0.0f : 2 * sum + static_cast<float>(blocks * kThreads);
    if (!expect(results[at * 2] == sum && results[at * 2 + 1] == second, name)) return;
  }
}

int main() {
  test_team_sums(2, 1);
  test_team_sums(2, 2);
  test_team_sums(1, 5);
  return failures > 0;
}
