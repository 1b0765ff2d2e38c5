// Adafactor's second moment, of which a matrix keeps a row and a column, and its step (common/adafactor.h). Of s g,
// where s = grad_scale grad_factor:
//   factored_squares      rows_bi = sum_j (s g_bij)^2        columns_bj = sum_i (s g_bij)^2
//   factored_square_sum   the sum of all u^2
//   adafactor_            the step of a parameter
// Each reads the gradient once; none makes a tensor of its size.
#include "common/adafactor.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/adafactor_tensors.h"
#include "common/kernel_table.h"
#include "cpu/optimizer.h"
#include "cpu/row_sums.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kLargeMatrix = 1 << 16;  // elements, from which on threads share one matrix

// Adds a row's squares to the columns' sums, and returns their sum.
template <typename T>
float add_squares(const T* grad, int64_t width, float scale, float* columns) {
  const auto [sum] = sum_each_vec<1>(width, [=](auto at, auto to, Vec* totals) {
    const Vec v = at(grad) * scale, square = v * v;
    totals[0] += square;
    to(columns, at(static_cast<const float*>(columns)) + square);
  });
  return sum;
}

template <typename T>
void squares_of(const Matrices& of, const T* grad, float scale, float* rows, float* columns) {
  const auto add_rows = [&](int64_t matrix, int64_t first, int64_t last, float* sums) {
    for (int64_t row = matrix * of.rows + first; row < matrix * of.rows + last; ++row) {
      rows[row] = add_squares(grad + row * of.width, of.width, scale, sums);
    }
  };
  if (of.rows * of.width < kLargeMatrix) {
    torch::stable::parallel_for(0, of.count, 64, [&](int64_t begin, int64_t end) {
      std::fill(columns + begin * of.width, columns + end * of.width, 0.0f);
      for (int64_t matrix = begin; matrix < end; ++matrix) {
        add_rows(matrix, 0, of.rows, columns + matrix * of.width);
      }
    });
    return;
  }
  for (int64_t matrix = 0; matrix < of.count; ++matrix) {
    RowSums sums(of.rows, of.width);
    sums.for_each_block([&](int64_t first, int64_t last, float* block) { add_rows(matrix, first, last, block); });
    sums.write(columns + matrix * of.width, 0, of.width);
  }
}

// grad_scale grad_factor.
float scale_of(const Tensor& grad, double grad_scale, const std::optional<Tensor>& grad_factor) {
  const float* factor = make_grad_factor(grad_factor, grad);
  return static_cast<float>(grad_scale) * (factor == nullptr ? 1.0f : *factor);
}

std::tuple<Tensor, Tensor> factored_squares(Tensor grad, double grad_scale, std::optional<Tensor> grad_factor) {
  const Matrices of = make_matrices(grad);
  const float scale = scale_of(grad, grad_scale, grad_factor);
  grad = as_contiguous(grad);
  Tensor rows = torch::stable::new_empty(grad, {of.count, of.rows, 1}, ScalarType::Float);
  Tensor columns = torch::stable::new_empty(grad, {of.count, 1, of.width}, ScalarType::Float);
  dispatch_floating("grad", grad, [&]<typename T>() {
    squares_of(of, grad.const_data_ptr<T>(), scale, rows.mutable_data_ptr<float>(), columns.mutable_data_ptr<float>());
  });
  return {rows, columns};
}

// Calls body(grad, columns, row's factor, offset in the range, how many) for the rows of a range of elements.
template <typename Body>
void for_each_row(const Factors& factors, int64_t first, int64_t count, const Body& body) {
  const auto [matrices, rows, width] = factors.of;
  int64_t row = first / width, column = first % width;
  for (int64_t done = 0; done < count; ++row, column = 0) {
    const int64_t n = std::min(count - done, width - column);
    body(factors.columns + row / rows * width + column, factors.rows[row], done, n);
    done += n;
  }
}

template <typename T>
struct Scaled {
  const T* grad;
  Factors factors;
  float values[kRun] = {};

  const float* at(int64_t first, int64_t count) {
    for_each_row(factors, first, count, [&](const float* columns, float row, int64_t done, int64_t n) {
      for_each_vec(n, [&](auto at, auto to) {
        to(values + done, at(grad + first + done) * min(at(columns) * row, broadcast(factors.most)));
      });
    });
    return values;
  }
};

Tensor factored_square_sum(Tensor grad, Tensor rows, Tensor columns, double most, double grad_scale,
                           std::optional<Tensor> grad_factor) {
  const float scale = scale_of(grad, grad_scale, grad_factor);
  grad = as_contiguous(grad);
  const Factors factors = make_factors(rows, columns, most, grad);
  const int64_t size = grad.numel(), tasks = (size + kElementsPerTask - 1) / kElementsPerTask;
  std::vector<double> sums(tasks);
  dispatch_floating("grad", grad, [&]<typename T>() {
    const T* data = grad.const_data_ptr<T>();
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kElementsPerTask, count = std::min(kElementsPerTask, size - first);
        for_each_row(factors, first, count, [&](const float* columns, float row, int64_t done, int64_t n) {
          const auto [sum] = sum_each_vec<1>(n, [=, &factors](auto at, auto, Vec* totals) {
            const Vec u = at(data + first + done) * scale * min(at(columns) * row, broadcast(factors.most));
            totals[0] += u * u;
          });
          sums[task] += sum;
        });
      }
    });
  });
  Tensor result = torch::stable::new_empty(grad, {}, ScalarType::Double);
  double total = 0;
  for (const double sum : sums) total += sum;
  *result.mutable_data_ptr<double>() = total;
  return result;
}

// Of one parameter.
void adafactor_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> moments,
                std::vector<Tensor> absmax, std::vector<Tensor> remainders, std::vector<int64_t> steps,
                std::vector<int64_t> indices, std::vector<int64_t> origins, int64_t seed, int64_t state_bits,
                double grad_scale, std::optional<Tensor> grad_factor, std::optional<Tensor> lr_factor, double lr,
                double beta1, double weight_decay, Tensor rows, Tensor columns, double most) {
  STD_TORCH_CHECK(params.size() == 1, "params: expected one, got ", params.size());
  const bool has_moment = !moments.empty();
  const Group group = make_group(params, grads, moments, absmax, remainders, steps, indices, origins, seed, state_bits,
                                 grad_scale, grad_factor, lr_factor, has_moment ? 1 : 0);
  const Factors factors = make_factors(rows, columns, most, params[0]);
  const auto scaled = [&]<typename T>(const T* grad) { return Scaled<T>{grad, factors}; };
  const Adafactor rule{lr, beta1, weight_decay};
  if (has_moment) {
    step_group<true>(group, rule, scaled);
  } else {
    step_group<>(group, rule, scaled);
  }
}

MEMKERNELS_CPU_KERNEL(factored_squares);
MEMKERNELS_CPU_KERNEL(factored_square_sum);
MEMKERNELS_CPU_KERNEL(adafactor_);

}  // namespace
}  // namespace memkernels::cpu
