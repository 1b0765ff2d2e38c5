// Adafactor's second moment, of which a matrix keeps a row and a column, and its step. Of matrices (B, M, N):
//   factored_squares      rows_bi = sum_j (s g_bij)^2        columns_bj = sum_i (s g_bij)^2
//   factored_square_sum   the sum of all u^2                 u_bij = s g_bij min(rows_bi columns_bj, most)
//   adafactor_            m = beta1 m + (1 - beta1) u        p -= lr weight_decay p + m, without a moment u
// Each reads the gradient once; none makes a tensor of its size.
#include <algorithm>
#include <tuple>
#include <vector>

#include "common/kernel_table.h"
#include "cpu/optimizer.h"
#include "cpu/row_sums.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kLargeMatrix = 1 << 16;  // elements, from which on threads share one matrix

struct Matrices {
  int64_t count, rows, width;
};

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

std::tuple<Tensor, Tensor> factored_squares(Tensor grad, double scale) {
  check_dim("grad", grad, 3);
  grad = as_contiguous(grad);
  const Matrices of{grad.size(0), grad.size(1), grad.size(2)};
  Tensor rows = torch::stable::new_empty(grad, {of.count, of.rows, 1}, ScalarType::Float);
  Tensor columns = torch::stable::new_empty(grad, {of.count, 1, of.width}, ScalarType::Float);
  dispatch_floating("grad", grad, [&]<typename T>() {
    squares_of(of, grad.const_data_ptr<T>(), static_cast<float>(scale), rows.mutable_data_ptr<float>(),
               columns.mutable_data_ptr<float>());
  });
  return {rows, columns};
}

// What the elements of matrices, one after the other, are multiplied by.
struct Factors {
  const float *rows, *columns;
  Matrices of;
  float most;
};

// The columns' factors have one dimension at least where there are several; what precedes it counts the matrices.
Factors make_factors(const Tensor& rows, const Tensor& columns, double most, int64_t size) {
  for (const auto& [name, tensor] : {std::pair("rows", rows), std::pair("columns", columns)}) {
    check_dtype(name, tensor, ScalarType::Float);
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  }
  const int64_t width = columns.dim() == 0 ? 1 : columns.size(-1);
  const int64_t count = width == 0 ? 0 : columns.numel() / width;
  STD_TORCH_CHECK(size == 0 || rows.numel() * width == size, "rows: expected ", width == 0 ? 0 : size / width,
                  " elements, got ", rows.numel());
  STD_TORCH_CHECK(size == 0 || rows.numel() % count == 0, "columns: expected those of whole matrices, got ", count,
                  " rows of them");
  const int64_t of_each = count == 0 ? 0 : rows.numel() / count;
  return {
      rows.const_data_ptr<float>(), columns.const_data_ptr<float>(), {count, of_each, width}, static_cast<float>(most)};
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

Tensor factored_square_sum(Tensor grad, Tensor rows, Tensor columns, double scale, double most) {
  grad = as_contiguous(grad);
  const Factors factors = make_factors(rows, columns, most, grad.numel());
  const int64_t size = grad.numel(), tasks = (size + kElementsPerTask - 1) / kElementsPerTask;
  std::vector<double> sums(tasks);
  dispatch_floating("grad", grad, [&]<typename T>() {
    const T* data = grad.const_data_ptr<T>();
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kElementsPerTask, count = std::min(kElementsPerTask, size - first);
        for_each_row(factors, first, count, [&](const float* columns, float row, int64_t done, int64_t n) {
          const auto [sum] = sum_each_vec<1>(n, [=, &factors](auto at, auto, Vec* totals) {
            const Vec u =
                at(data + first + done) * static_cast<float>(scale) * min(at(columns) * row, broadcast(factors.most));
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

struct AdafactorUpdate {
  float decay, beta1, fresh;

  template <typename Lanes>
  void apply(Vec& p, Vec u) const {
    p -= decay * p + u;
  }

  template <typename Lanes>
  void apply(Vec& p, Vec u, Vec& m) const {
    m = beta1 * m + fresh * u;
    p -= decay * p + m;
  }

  AdafactorUpdate scaled(float factor) const { return {decay * factor, beta1, fresh}; }
};

struct Adafactor {
  double lr, beta1, weight_decay;

  AdafactorUpdate at(uint32_t) const {
    return {static_cast<float>(lr * weight_decay), static_cast<float>(beta1), static_cast<float>(1 - beta1)};
  }
};

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
  const Factors factors = make_factors(rows, columns, most, params[0].numel());
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
