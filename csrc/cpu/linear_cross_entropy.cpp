// Row kernels of linear cross-entropy, for logits that arrive one tile of the vocabulary at a time: columns
// [vocab_start, vocab_start + cols). With x a logit, z = softcap * tanh(x / softcap) (z = x without softcap),
// lse = log(sum of exp(z)) over the whole row, y the target and s the label smoothing:
//   loss = lse - (1 - s) * z_y - s / vocab_size * sum of z + z_loss * lse^2
// cross_entropy_stats merges a tile into the running statistics of its rows; cross_entropy_grad_ overwrites it by
// grad_loss * dloss/dx. Arithmetic is float32. A probability is exp(z - row_max) / row_sum: lse, rounded where the
// logits are large, would put its error into every one of them.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kElementsPerTask = 32768;

int64_t rows_per_task(int64_t cols) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, cols));
}

// What is subtracted before exp: a row of nothing but -inf must not become inf - inf.
float exp_shift(float max) {
  return max == -kInfinity ? 0.0f : max;
}

template <bool softcapped>
struct Cap {
  float softcap;
  float inverse = 1.0f / softcap;

  Vec tanh_of(Vec logit) const { return softcapped ? tanh(logit * inverse) : logit; }
  Vec value_of(Vec tanh) const { return softcapped ? tanh * softcap : tanh; }
  Vec operator()(Vec logit) const { return value_of(tanh_of(logit)); }
  // dz/dx, given tanh_of(x).
  Vec chain(Vec gradient, Vec tanh) const { return softcapped ? gradient * (1.0f - tanh * tanh) : gradient; }
};

template <typename Body>
void dispatch_softcap(double softcap, Body&& body) {
  if (softcap > 0.0) return body(Cap<true>{static_cast<float>(softcap)});
  body(Cap<false>{1.0f});
}

template <typename T>
float largest(const T* row, int64_t cols) {
  Vec largest = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) largest = max(largest, load(row + i));
  if (i < cols) largest = max(largest, load_partial(row + i, cols - i, -kInfinity));
  return max(largest);
}

template <typename T, typename Z>
void stats(const T* logits, const int64_t* target, int64_t rows, int64_t cols, int64_t vocab_start,
           int64_t ignore_index, Z z, float* row_max, float* row_sum, float* target_logit, float* logit_sum) {
  torch::stable::parallel_for(0, rows, rows_per_task(cols), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = logits + r * cols;
      const float tile_max = z(broadcast(largest(row, cols)))[0];
      const float new_max = std::max(row_max[r], tile_max);
      const float shift = exp_shift(new_max);
      Vec exp_sum{}, z_sum{};
      int64_t i = 0;
      for (; i + kLanes <= cols; i += kLanes) {
        const Vec v = z(load(row + i));
        exp_sum += exp(v - shift);
        z_sum += v;
      }
      float exp_total = sum(exp_sum), z_total = sum(z_sum);
      for (; i < cols; ++i) {
        const float v = z(broadcast(static_cast<float>(row[i])))[0];
        exp_total += exp(broadcast(v - shift))[0];
        z_total += v;
      }
      row_sum[r] = row_sum[r] * std::exp(row_max[r] - shift) + exp_total;
      row_max[r] = new_max;
      logit_sum[r] += z_total;
      const int64_t column = target[r] - vocab_start;
      if (target[r] != ignore_index && column >= 0 && column < cols) {
        target_logit[r] = z(broadcast(static_cast<float>(row[column])))[0];
      }
    }
  });
}

template <typename T, typename Z>
void grad(T* logits, const int64_t* target, int64_t rows, int64_t cols, int64_t vocab_start, int64_t vocab_size,
          const float* row_max, const float* row_sum, const float* grad_loss, int64_t ignore_index, Z z,
          float label_smoothing, float z_loss) {
  torch::stable::parallel_for(0, rows, rows_per_task(cols), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* row = logits + r * cols;
      if (target[r] == ignore_index) {
        std::fill_n(row, cols, static_cast<T>(0.0f));
        continue;
      }
      const float shift = exp_shift(row_max[r]);
      const float lse = row_max[r] + std::log(row_sum[r]);
      // A row of nothing but -inf has lse -inf and every probability 0, which no z_loss may turn into NaN.
      const float scale = row_max[r] == -kInfinity ? 0.0f : grad_loss[r] * (1.0f + 2.0f * z_loss * lse) / row_sum[r];
      const float smoothing = grad_loss[r] * (label_smoothing / static_cast<float>(vocab_size));
      const auto gradient = [=](Vec logit, float target_part) {
        const Vec t = z.tanh_of(logit);
        return z.chain(exp(z.value_of(t) - shift) * scale - target_part, t);
      };
      const int64_t column = target[r] - vocab_start;
      const bool here = column >= 0 && column < cols;
      const float target_logit = here ? static_cast<float>(row[column]) : 0.0f;
      for_each_vec(cols, [&](auto at, auto to) { to(row, gradient(at(row), smoothing)); });
      if (here) {
        const float target_part = smoothing + grad_loss[r] * (1.0f - label_smoothing);
        row[column] = static_cast<T>(gradient(broadcast(target_logit), target_part)[0]);
      }
    }
  });
}

void check_rows(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& logits) {
  check_dtype(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.numel() == logits.size(0) && tensor.is_contiguous(), name, ": expected ", logits.size(0),
                  " contiguous elements, one per row of logits, got ", tensor.numel());
}

void check_tile(const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits: expected a contiguous [rows, columns]");
  check_rows("target", target, ScalarType::Long, logits);
}

void cross_entropy_stats(Tensor logits, Tensor target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                         double softcap, Tensor row_max, Tensor row_sum, Tensor target_logit, Tensor logit_sum) {
  check_tile(logits, target);
  check_rows("row_max", row_max, ScalarType::Float, logits);
  check_rows("row_sum", row_sum, ScalarType::Float, logits);
  check_rows("target_logit", target_logit, ScalarType::Float, logits);
  check_rows("logit_sum", logit_sum, ScalarType::Float, logits);
  dispatch_floating("logits", logits, [&]<typename T>() {
    dispatch_softcap(softcap, [&](auto z) {
      stats(logits.const_data_ptr<T>(), target.const_data_ptr<int64_t>(), logits.size(0), logits.size(1), vocab_start,
            ignore_index, z, row_max.mutable_data_ptr<float>(), row_sum.mutable_data_ptr<float>(),
            target_logit.mutable_data_ptr<float>(), logit_sum.mutable_data_ptr<float>());
    });
  });
}

void cross_entropy_grad_(Tensor logits, Tensor target, int64_t vocab_start, int64_t vocab_size, Tensor row_max,
                         Tensor row_sum, Tensor grad_loss, int64_t ignore_index, double softcap, double label_smoothing,
                         double z_loss) {
  check_tile(logits, target);
  check_rows("row_max", row_max, ScalarType::Float, logits);
  check_rows("row_sum", row_sum, ScalarType::Float, logits);
  check_rows("grad_loss", grad_loss, ScalarType::Float, logits);
  dispatch_floating("logits", logits, [&]<typename T>() {
    dispatch_softcap(softcap, [&](auto z) {
      grad(logits.mutable_data_ptr<T>(), target.const_data_ptr<int64_t>(), logits.size(0), logits.size(1), vocab_start,
           vocab_size, row_max.const_data_ptr<float>(), row_sum.const_data_ptr<float>(),
           grad_loss.const_data_ptr<float>(), ignore_index, z, static_cast<float>(label_smoothing),
           static_cast<float>(z_loss));
    });
  });
}

MEMKERNELS_CPU_KERNEL(cross_entropy_stats);
MEMKERNELS_CPU_KERNEL(cross_entropy_grad_);

}  // namespace
}  // namespace memkernels::cpu
