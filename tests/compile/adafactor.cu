// Instantiates every kernel of Adafactor, for the table of registers and spills.
#include "cuda/adafactor.cuh"

using namespace memkernels;
using namespace memkernels::cuda;

template <typename T>
void squares(const T* grad, const Factors& factors) {
  launch_factored_squares(SquareTiles<T>(grad, factors.of, 1, nullptr), nullptr, nullptr, nullptr);
  launch_factored_square_sum({factors, 1, kSummedRuns}, grad, 1, nullptr, nullptr, nullptr, nullptr);
}

void step(const float* grad, const uint16_t* narrow, const Group& group, const Factors& factors) {
  squares(grad, factors);
  squares(narrow, factors);
  launch_part_sums(nullptr, 1, 1, nullptr, nullptr);
  launch_adafactor(group, true, {}, factors, nullptr);
}
