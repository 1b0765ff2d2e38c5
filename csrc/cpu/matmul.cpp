// out = c + alpha a b: products of whole matrices, where they are faster than torch's (`python -m memkernels.bench
// matmul`). c and out may be float32 where a and b are narrower.
//
// A panel of b, 64 columns wide and a part of k deep, is packed into units along k (tile_matmul.h) that stay in the L2
// cache, and is multiplied by 6 rows of a at a time, read from where they are; the next 6 are fetched ahead. It is as
// many strips of columns as vector registers ask for. Where a's rows are not units in memory, because they lie along m,
// are of odd length, or are to be widened, a part of them is packed first. Sums are float32: over at most kSumUnits one
// after the other, and then over these.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "cpu/tasks.h"
#include "cpu/tile_matmul.h"
#include "cpu/vec.h"

namespace memkernels::cpu {
namespace {

// A tile of sums, with a vector of b for each of kTileVecs and one of a, takes the registers: 32, or 16.
constexpr int64_t kTileRows = 6;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileVecs = 4;
constexpr int64_t kPanelUnits = 2048;  // of k, so that a panel takes 512 KiB
#else
constexpr int kTileVecs = 2;
constexpr int64_t kPanelUnits = 512;  // 128 KiB, and a's rows, which several strips read, stay in the L1 cache
#endif
constexpr int64_t kStrip = kTileVecs * kLanes;  // columns
constexpr int64_t kPanel = 64;
constexpr int64_t kLeastTaskRows = 256, kMostTaskRows = 4096;
constexpr int64_t kPackedBytes = 2 << 20;  // of a
constexpr int64_t kPackedRows = 192;       // at a time
constexpr int64_t kTransposed = 32;        // units at a time

// Of k, summed one after the other: what is rounded to 16 bits at the end does not need shorter sums.
template <typename U>
constexpr int64_t kSumUnits = kDepth<U> == 1 ? 256 : kPanelUnits;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A matrix of which one dimension is k. Its elements along k, or those across it, are neighbours.
template <typename T>
struct Operand {
  const T* data;
  int64_t along_k, across;  // strides

  Operand(const Tensor& matrix, int64_t k_dim)
      : data(matrix.const_data_ptr<T>()),
        along_k(matrix.size(k_dim) == 1 ? 1 : matrix.stride(k_dim)),
        across(matrix.stride(1 - k_dim)) {}

  const T* at(int64_t index, int64_t k) const { return data + index * across + k * along_k; }

  // Whether rows along k are units as they are.
  template <typename U>
  bool has_units(int64_t k) const {
    if constexpr (kDepth<U> == 1) {
      return along_k == 1 && std::is_same_v<T, U>;
    } else {
      return along_k == 1 && k % kDepth<U> == 0 && across % kDepth<U> == 0;
    }
  }
};

// Of `count` rows along k, from `index` on, the units of k0 to k1: out[count_out][out_stride], zeros beyond count.
template <typename T, typename U>
void pack_along(const Operand<T>& x, int64_t index, int64_t count, int64_t k0, int64_t k1, U* out, int64_t count_out,
                int64_t out_stride) {
  if (x.along_k == 1) {
    const int64_t units = ceil_div(k1 - k0, kDepth<U>);
    for (int64_t row = 0; row < count_out; ++row) {
      pack_rows(x.at(index + row, k0), x.across, row < count ? 1 : 0, k1 - k0, out + row * out_stride, 1, units);
    }
    return;
  }
  const Buffer<U> across(kTransposed * count_out);
  for (int64_t k = k0; k < k1; k += kTransposed * kDepth<U>) {
    const int64_t depth = std::min(kTransposed * kDepth<U>, k1 - k), units = ceil_div(depth, kDepth<U>);
    pack_columns(x.at(index, k), x.along_k, depth, count, across.get(), units, count_out);
    transpose(across.get(), count_out, units, count_out, out + (k - k0) / kDepth<U>, out_stride);
  }
}

// The same across k, a strip: out[units][kStrip].
template <typename T, typename U>
void pack_across(const Operand<T>& x, int64_t index, int64_t count, int64_t k0, int64_t k1, U* out) {
  const int64_t units = ceil_div(k1 - k0, kDepth<U>);
  if (x.across == 1 && x.along_k != 1) {
    pack_columns(x.at(index, k0), x.along_k, k1 - k0, count, out, units, kStrip);
  } else if (count == kStrip && x.template has_units<U>(k1)) {
    transpose(reinterpret_cast<const U*>(x.at(index, k0)), x.across / kDepth<U>, kStrip, units, out, kStrip);
  } else {
    const Buffer<U> rows(kStrip * units);
    pack_along(x, index, count, k0, k1, rows.get(), kStrip, units);
    transpose(rows.get(), units, kStrip, units, out, kStrip);
  }
}

template <typename T>
void store_pair(T* p, Vec low, Vec high) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, BFloat16>) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    return;
  }
#endif
  store(p, low);
  store(p + kLanes, high);
}

// What the products are added to: c, whose elements along n are neighbours or one and the same.
template <typename T>
struct Addend {
  const T* data;  // null: nothing
  int64_t row_stride, step;

  Vec at(int64_t row, int64_t column) const {
    const T* from = data + row * row_stride;
    return step == 0 ? broadcast(static_cast<float>(*from)) : load(from + column);
  }
  Vec at(int64_t row, int64_t column, int64_t count) const {
    const T* from = data + row * row_stride;
    return step == 0 ? broadcast(static_cast<float>(*from)) : load_partial(from + column, count);
  }
};

// Operands of T, in units of U; c and out of O.
template <typename T, typename U, typename O>
class Product {
 public:
  Product(const Operand<T>& a, const Operand<T>& b, const Addend<O>& c, float alpha, O* out, int64_t out_stride,
          int64_t m, int64_t n, int64_t k)
      : a_(a), b_(b), c_(c), alpha_(alpha), out_(out), out_stride_(out_stride), m_(m), n_(n), k_(k) {}

  void run() const {
    if (m_ >= kTileRows && a_.template has_units<U>(k_)) {
      return multiply({reinterpret_cast<const U*>(a_.data), a_.across / kDepth<U>, 0, m_, m_});
    }
    const int64_t units = ceil_div(k_, kDepth<U>);
    // Rows that begin a power of two apart would share few lines of a cache.
    const int64_t stride = round_up(units, kLineUnits) + kLineUnits;
    const int64_t block = even_rows(m_, kPackedBytes / (stride * static_cast<int64_t>(sizeof(U))));
    const Buffer<U> packed(block * stride);
    for (int64_t first = 0; first < m_; first += block) {
      const int64_t count = std::min(block, m_ - first), padded = round_up(count, kTileRows);
      parallel_tasks(ceil_div(padded, kPackedRows), [&](int64_t task) {
        const int64_t row = task * kPackedRows;
        pack_along(a_, first + row, std::min(kPackedRows, count - row), 0, k_, packed.get() + row * stride,
                   std::min(kPackedRows, padded - row), stride);
      });
      multiply({packed.get(), stride, first, count, padded});
    }
  }

 private:
  // Rows of a, in units.
  struct Rows {
    const U* data;
    int64_t stride, first, count, readable;
  };

  struct Scratch {
    Buffer<U> panel;
    Buffer<float> sums;
  };

  // `count` rows in even blocks of whole tiles, of about `most` at most.
  static int64_t even_rows(int64_t count, int64_t most) {
    return round_up(ceil_div(count, ceil_div(count, std::max<int64_t>(1, most))), kTileRows);
  }

  void multiply(const Rows& rows) const {
    const int64_t panels = ceil_div(n_, kPanel);
    // Enough tasks that threads end together.
    const int64_t share = rows.count * panels / (4 * torch::stable::get_num_threads());
    const int64_t block = even_rows(rows.count, std::clamp(share, kLeastTaskRows, kMostTaskRows));
    const int64_t blocks = ceil_div(rows.count, block);
    const auto make_scratch = [&] {
      const int64_t units = std::min(ceil_div(k_, kDepth<U>), kPanelUnits);
      return Scratch{Buffer<U>(units * kPanel), Buffer<float>(is_one_part() ? 0 : block * kPanel)};
    };
    parallel_tasks(panels * blocks, make_scratch, [&](const Scratch& scratch, int64_t task) {
      const int64_t begin = task % blocks * block, end = std::min(begin + block, rows.count);
      const int64_t column = task / blocks * kPanel, count = std::min(kPanel, n_ - column);
      multiply_panel(rows, begin, end, column, count, scratch);
    });
  }

  bool is_one_part() const { return k_ <= kPanelUnits * kDepth<U>; }

  void multiply_panel(const Rows& rows, int64_t begin, int64_t end, int64_t column, int64_t count,
                      const Scratch& scratch) const {
    alignas(64) float tile[kTileRows * kStrip];
    for (int64_t k = 0; k < k_; k += kPanelUnits * kDepth<U>) {
      const int64_t k_end = std::min(k + kPanelUnits * kDepth<U>, k_), units = ceil_div(k_end - k, kDepth<U>);
      for (int64_t strip = 0; strip < count; strip += kStrip) {
        pack_across(b_, column + strip, std::min(kStrip, count - strip), k, k_end, scratch.panel.get() + strip * units);
      }
      for (int64_t row = begin; row < end; row += kTileRows) {
        // The last tile's rows begin earlier where fewer are left, and those that came before are passed over.
        const int64_t start = std::min(row, rows.readable - kTileRows), past = row - start;
        const int64_t next = std::min(row + kTileRows, rows.readable - kTileRows);
        const int64_t tile_rows = std::min(kTileRows - past, end - row);
        const U* a = rows.data + k / kDepth<U>;
        for (int64_t strip = 0; strip < count; strip += kStrip) {
          const int64_t width = std::min(kStrip, count - strip), vecs = ceil_div(width, kLanes);
          multiply_tile(vecs, units, a + start * rows.stride, a + next * rows.stride, rows.stride,
                        scratch.panel.get() + strip * units, tile);
          float* sums = scratch.sums.get() + (row - begin) * kPanel + strip;
          for (int64_t r = 0; r < tile_rows; ++r) {
            float* of_row = tile + (past + r) * kStrip;
            if (!is_one_part()) add(of_row, sums + r * kPanel, k > 0, vecs);
            if (k_end == k_) write(of_row, rows.first + row + r, column + strip, width);
          }
        }
      }
    }
  }

  // tile[kTileRows][kStrip], of `count` vectors. A function of its own, so that all vector registers are its sums'.
  template <int vecs = kTileVecs>
  [[gnu::noinline]] static void multiply_tile(int64_t count, int64_t units, const U* a, const U* next_a, int64_t stride,
                                              const U* panel, float* tile) {
    if constexpr (vecs > 1) {
      if (count < vecs) return multiply_tile<vecs - 1>(count, units, a, next_a, stride, panel, tile);
    }
    alignas(64) float part[kTileRows * kStrip];
    for (int64_t unit = 0; unit < units; unit += kSumUnits<U>) {
      const int64_t depth = std::min(kSumUnits<U>, units - unit);
      register_tile<kTileRows, vecs, true>(depth, a + unit, stride, panel + unit * kStrip, kStrip,
                                           unit == 0 ? tile : part, kStrip, false, next_a + unit);
      if (unit == 0) continue;
      for (int64_t row = 0; row < kTileRows; ++row) {
        for (int64_t v = 0; v < vecs; ++v) {
          float* sum = tile + row * kStrip + v * kLanes;
          store(sum, load(sum) + load(part + row * kStrip + v * kLanes));
        }
      }
    }
  }

  // Adds the sums of earlier parts of k to a row of a tile, and keeps the total with them.
  static void add(float* row, float* sums, bool has_sums, int64_t vecs) {
    for (int64_t v = 0; v < vecs * kLanes; v += kLanes) {
      if (has_sums) store(row + v, load(row + v) + load(sums + v));
      store(sums + v, load(row + v));
    }
  }

  void write(const float* sums, int64_t row, int64_t column, int64_t count) const {
    O* to = out_ + row * out_stride_ + column;
    if (count == kStrip && c_.data == nullptr) {
      for (int64_t i = 0; i < kStrip; i += 2 * kLanes) {
        store_pair(to + i, load(sums + i) * alpha_, load(sums + i + kLanes) * alpha_);
      }
      return;
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vec product = load(sums + i);
      store(to + i, c_.data == nullptr ? product * alpha_ : product * alpha_ + c_.at(row, column + i));
    }
    if (i == count) return;
    const Vec product = load(sums + i);
    store_partial(to + i, c_.data == nullptr ? product * alpha_ : product * alpha_ + c_.at(row, column + i, count - i),
                  count - i);
  }

  const Operand<T> a_, b_;
  const Addend<O> c_;
  const float alpha_;
  O* const out_;
  const int64_t out_stride_, m_, n_, k_;
};

bool has_rows(const Tensor& matrix) {
  return matrix.size(1) == 1 || matrix.stride(1) == 1;
}

bool has_columns(const Tensor& matrix) {
  return matrix.size(0) == 1 || matrix.stride(0) == 1;
}

Tensor with_neighbours(const Tensor& matrix) {
  return has_rows(matrix) || has_columns(matrix) ? matrix : as_contiguous(matrix);
}

// For out (m, n) of neighbours along n.
template <typename T, typename O>
void multiply_into(const Tensor& a, const Tensor& b, const std::optional<Tensor>& c, float alpha, Tensor& out) {
  const Addend<O> addend = c.has_value() ? Addend<O>{c->const_data_ptr<O>(), c->stride(0), c->stride(1)} : Addend<O>{};
  const Product<T, Unit<T>, O> product(Operand<T>(a, 1), Operand<T>(b, 0), addend, alpha, out.mutable_data_ptr<O>(),
                                       out.stride(0), a.size(0), b.size(1), a.size(1));
  product.run();
}

void matmul_into_(const Tensor& a_in, const Tensor& b_in, const std::optional<Tensor>& c_in, double alpha, Tensor out) {
  check_dim("a", a_in, 2);
  check_dim("b", b_in, 2);
  const int64_t m = a_in.size(0), n = b_in.size(1);
  check_tensor("b", b_in, a_in.scalar_type(), {a_in.size(1), n});
  check_shape("out", out, {m, n});
  check_tensor("c", c_in, out.scalar_type(), {m, n});
  STD_TORCH_CHECK(has_rows(out) || has_columns(out), "out: expected elements that are neighbours along one dimension");
  STD_TORCH_CHECK(a_in.size(1) > 0, "a: expected at least one column");
  if (m == 0 || n == 0) return;
  Tensor a = with_neighbours(a_in), b = with_neighbours(b_in);
  std::optional<Tensor> c = c_in;
  if (!has_rows(out)) {  // out^T = c^T + alpha b^T a^T
    const auto flipped = [](const Tensor& x) { return torch::stable::transpose(x, 0, 1); };
    std::swap(a, b);
    a = flipped(a), b = flipped(b), out = flipped(out);
    if (c.has_value()) c = flipped(*c);
  }
  if (c.has_value() && c->size(1) > 1 && c->stride(1) > 1) c = as_contiguous(*c);
  dispatch_floating("a", a, "out", out.scalar_type(),
                    [&]<typename T, typename O>() { multiply_into<T, O>(a, b, c, static_cast<float>(alpha), out); });
}

MEMKERNELS_CPU_KERNEL(matmul_into_);

}  // namespace
}  // namespace memkernels::cpu
