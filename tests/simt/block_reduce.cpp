// csrc/common/cuda_reduce.cuh against plain loops, for every size of block. A reduction has two barriers;
// -DREMOVE_SYNC=0 leaves out the first and -DREMOVE_SYNC=1 the second of each, which ThreadSanitizer has to see.
#include "check.h"

#ifdef REMOVE_SYNC
inline void syncthreads_but_one() {
  thread_local int calls = 0;
  if (calls++ % 2 != REMOVE_SYNC) __syncthreads();
}
  #define __syncthreads syncthreads_but_one
#endif

#include "common/cuda_launch.cuh"
#include "common/cuda_reduce.cuh"

using namespace memkernels::cuda;

constexpr int kRounds = 3;  // a reduction may follow another on the same shared memory

template <int Threads>
__global__ void reduce_kernel(const float* input, float* sums, float* maxima, SoftmaxState* softmax) {
  for (int round = 0; round < kRounds; ++round) {
    const int64_t index = (int64_t{blockIdx.x} * kRounds + round) * Threads + threadIdx.x;
    const float value = input[index];
    sums[index] = block_reduce<Threads>(value, Sum());
    maxima[index] = block_reduce<Threads>(value, Max());
    softmax[index] = block_reduce<Threads>(SoftmaxState{value, value == -INFINITY ? 0.0f : 1.0f}, MergeSoftmax());
  }
}

template <int Threads>
void test_block_reduce() {
  constexpr int kBlocks = 3;
  constexpr int64_t kSize = int64_t{kBlocks} * kRounds * Threads;
  const std::string name = "block_reduce<" + std::to_string(Threads) + ">";
  Random random(Threads);
  std::vector<float> input(kSize);
  for (float& value : input) value = static_cast<float>(random() * 4);
  for (int thread = 0; thread < Threads; ++thread) input[thread] = -INFINITY;
  input[Threads] = -INFINITY;
  std::vector<float> sums(kSize), maxima(kSize);
  std::vector<SoftmaxState> softmax(kSize);
  launch(reduce_kernel<Threads>, kBlocks, Threads, nullptr, input.data(), sums.data(), maxima.data(), softmax.data());

  for (int64_t first = 0; first < kSize; first += Threads) {
    double sum = 0.0, exp_sum = 0.0, max = -INFINITY;
    for (int thread = 0; thread < Threads; ++thread) max = std::max(max, double{input[first + thread]});
    for (int thread = 0; thread < Threads; ++thread) {
      sum += input[first + thread];
      exp_sum += max == -INFINITY ? 0.0 : std::exp(input[first + thread] - max);
    }
    bool good = true;
    for (int64_t i = first; i < first + Threads; ++i) {
      good = good && (sums[i] == sum || std::abs(sums[i] - sum) < 1e-6 * Threads) && maxima[i] == max &&
             softmax[i].max == max && std::abs(softmax[i].sum - exp_sum) < 1e-6 * (1 + exp_sum) &&
             std::memcmp(&sums[i], &sums[first], sizeof(float)) == 0;
    }
    if (!expect(good, name)) return;
  }
}

int main() {
  test_block_reduce<32>();
  test_block_reduce<64>();
  test_block_reduce<128>();
  test_block_reduce<256>();
  return failures > 0;
}
