// Rotary position embedding of q and k, each (B, S, H, D) with strides of its own and the last dimension contiguous.
// The R columns of cos and sin rotate the pairs (a, b) of the first R elements of a head; the rest passes through:
//   a' = a * cos[i] - b * sin[i]        b' = b * cos[i + R/2] + a * sin[i + R/2]
// Pair i is the elements i and i + R/2, or 2i and 2i + 1 where they are interleaved. The gradient is the transpose:
//   da = da' * cos[i] + db' * sin[i + R/2]        db = db' * cos[i + R/2] - da' * sin[i]
#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/outputs.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

constexpr int64_t kTokensPerTile = 16;

// A head's four rows of coefficients, each R/2 floats: a' = a * aa + b * ab, b' = b * bb + a * ba.
struct Coefficients {
  const float *aa, *ab, *bb, *ba;
};

template <typename C>
void fill(float* table, const C* cos, const C* sin, int64_t half, bool transpose) {
  float *aa = table, *ab = table + half, *bb = table + 2 * half, *ba = table + 3 * half;
  for_each_vec(half, [&](auto at, auto to) {
    const Vec first = at(sin), second = at(sin + half);
    to(aa, at(cos));
    to(bb, at(cos + half));
    to(ab, transpose ? second : -first);
    to(ba, transpose ? -first : second);
  });
}

template <typename T>
void rotate_halves(const T* x, T* y, Coefficients c, int64_t half) {
  for_each_vec(half, [&](auto at, auto to) {
    const Vec a = at(x), b = at(x + half);
    to(y, a * at(c.aa) + b * at(c.ab));
    to(y + half, b * at(c.bb) + a * at(c.ba));
  });
}

template <typename T>
void rotate_interleaved(const T* x, T* y, Coefficients c, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    float pairs[2 * kLanes], a[kLanes], b[kLanes];
    store(pairs, load(x + 2 * i));
    store(pairs + kLanes, load(x + 2 * i + kLanes));
    for (int64_t j = 0; j < kLanes; ++j) a[j] = pairs[2 * j], b[j] = pairs[2 * j + 1];
    const Vec va = load(a), vb = load(b);
    store(a, va * load(c.aa + i) + vb * load(c.ab + i));
    store(b, vb * load(c.bb + i) + va * load(c.ba + i));
    for (int64_t j = 0; j < kLanes; ++j) pairs[2 * j] = a[j], pairs[2 * j + 1] = b[j];
    store(y + 2 * i, load(pairs));
    store(y + 2 * i + kLanes, load(pairs + kLanes));
  }
  for (; i < half; ++i) {
    const float a = static_cast<float>(x[2 * i]), b = static_cast<float>(x[2 * i + 1]);
    y[2 * i] = static_cast<T>(a * c.aa[i] + b * c.ab[i]);
    y[2 * i + 1] = static_cast<T>(b * c.bb[i] + a * c.ba[i]);
  }
}

struct Strides {
  int64_t batch, token, head;
  explicit Strides(const Tensor& x) : batch(x.stride(0)), token(x.stride(1)), head(x.stride(2)) {}
};

// Rotates the heads of `tokens` tokens, in the order in which they lie in memory.
template <typename T>
void rotate_tile(const T* x, T* y, Strides in, Strides out, const float* table, int64_t tokens, int64_t heads,
                 int64_t size, int64_t half, bool interleaved) {
  const auto one_head = [&](int64_t token, int64_t head) {
    const float* row = table + token * 4 * half;
    const Coefficients c{row, row + half, row + 2 * half, row + 3 * half};
    const T* from = x + token * in.token + head * in.head;
    T* to = y + token * out.token + head * out.head;
    interleaved ? rotate_interleaved(from, to, c, half) : rotate_halves(from, to, c, half);
    std::copy(from + 2 * half, from + size, to + 2 * half);
  };
  if (in.head > in.token) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t token = 0; token < tokens; ++token) one_head(token, head);
    }
  } else {
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t head = 0; head < heads; ++head) one_head(token, head);
    }
  }
}

// Tensors whose heads do not lie apart in memory are copied; memkernels/ops/rotary/op.py has the same rule.
Tensor with_rows(const Tensor& x) {
  const bool rows = x.stride(3) == 1 && std::min({x.stride(0), x.stride(1), x.stride(2)}) >= x.size(3);
  return rows ? x : as_contiguous(x);
}

void check_arguments(const char* q_name, const Tensor& q, const char* k_name, const Tensor& k, const Tensor& cos,
                     const Tensor& sin) {
  check_dim(q_name, q, 4);
  check_dim(k_name, k, 4);
  check_tensor(k_name, k, q.scalar_type(), {q.size(0), q.size(1), k.size(2), q.size(3)});
  STD_TORCH_CHECK(cos.dim() == 2 || cos.dim() == 3, "cos: expected (S, R) or (B, S, R), got shape ",
                  text_of(cos.sizes()));
  const int64_t width = cos.size(-1);
  STD_TORCH_CHECK(width % 2 == 0 && width <= q.size(3), "cos: expected an even last dimension of at most ", q.size(3),
                  ", got ", width);
  if (cos.dim() == 2) {
    check_shape("cos", cos, {q.size(1), width});
  } else {
    check_shape("cos", cos, {cos.size(0) == 1 ? 1 : q.size(0), q.size(1), width});
  }
  check_tensor("sin", sin, cos.scalar_type(), cos.sizes());
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q_in, const Tensor& k_in, const Tensor& cos_in, const Tensor& sin_in,
                                  bool interleaved, bool transpose) {
  check_arguments(transpose ? "dq" : "q", q_in, transpose ? "dk" : "k", k_in, cos_in, sin_in);
  const Tensor q = with_rows(q_in), k = with_rows(k_in), cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const int64_t batches = q.size(0), tokens = q.size(1), size = q.size(3), half = cos.size(-1) / 2;
  const int64_t table_batch_stride = cos.dim() == 3 && cos.size(0) > 1 ? cos.stride(0) : 0;
  const int64_t tiles = (tokens + kTokensPerTile - 1) / kTokensPerTile;
  Tensor q_out = output_like(q), k_out = output_like(k);
  dispatch_floating(transpose ? "dq" : "q", q, "cos", cos.scalar_type(), [&]<typename T, typename C>() {
    const auto *cos_data = cos.const_data_ptr<C>(), *sin_data = sin.const_data_ptr<C>();
    const auto *q_data = q.const_data_ptr<T>(), *k_data = k.const_data_ptr<T>();
    auto *q_out_data = q_out.mutable_data_ptr<T>(), *k_out_data = k_out.mutable_data_ptr<T>();
    const Strides q_in{q}, k_in{k}, q_to{q_out}, k_to{k_out};
    torch::stable::parallel_for(0, batches * tiles, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> table(kTokensPerTile * 4 * half);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t batch = tile / tiles, first = tile % tiles * kTokensPerTile;
        const int64_t count = std::min(kTokensPerTile, tokens - first);
        for (int64_t token = 0; token < count; ++token) {
          const int64_t row = batch * table_batch_stride + (first + token) * 2 * half;
          fill(table.data() + token * 4 * half, cos_data + row, sin_data + row, half, transpose);
        }
        rotate_tile(q_data + batch * q_in.batch + first * q_in.token,
                    q_out_data + batch * q_to.batch + first * q_to.token, q_in, q_to, table.data(), count, q.size(2),
                    size, half, interleaved);
        rotate_tile(k_data + batch * k_in.batch + first * k_in.token,
                    k_out_data + batch * k_to.batch + first * k_to.token, k_in, k_to, table.data(), count, k.size(2),
                    size, half, interleaved);
      }
    });
  });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rotary_fwd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                      bool interleaved) {
  return rotate(q, k, cos, sin, interleaved, false);
}

std::tuple<Tensor, Tensor> rotary_bwd(const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin,
                                      bool interleaved) {
  return rotate(dq, dk, cos, sin, interleaved, true);
}

MEMKERNELS_CPU_KERNEL(rotary_fwd);
MEMKERNELS_CPU_KERNEL(rotary_bwd);

}  // namespace
}  // namespace memkernels::cpu
