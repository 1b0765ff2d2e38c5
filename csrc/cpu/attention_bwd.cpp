// Attention backward. With P = exp(S - lse), delta = rowsum(dO * O) - dlse and slope = d S / d (Q K^T):
//   dV = P^T dO      dS = P * (dO V^T - delta) * slope      dQ = dS K      dK = dS^T Q
// P and dO V^T are those of dropout where there is dropout. Each task owns the gradients of one head of k and v, walks
// its keys, and for each the queries that see them: no atomics, the same result for any number of threads.
#include <tuple>

#include "common/kernel_table.h"
#include "cpu/attention_call.h"
#include "cpu/outputs.h"

namespace memkernels::cpu {
namespace {

template <typename T>
struct Gradients {
  Rows<const T> out, dout;
  const float* lse;
  const float* dlse;  // null where lse has no gradient
  Rows<T> dq, dk, dv;
  float* dsinks;  // (sequences, heads), null without sinks
};

// What all queries of one head bring to the products, packed once: tile t starts at t * (its size).
template <typename U>
struct PackedQueries {
  PackedQueries(int64_t tiles, const Padded<U>& size, const Padded<U>& value)
      : q_columns(tiles * size.depth * kQueries),
        q_rows(tiles * kUnits * size.lanes),
        dout_columns(tiles * value.depth * kQueries),
        dout_rows(tiles * kUnits * value.lanes),
        lse(tiles * kQueries),
        delta(tiles * kQueries),
        dq(tiles * size.rows * kQueries) {}

  static constexpr int64_t kUnits = kQueries / kDepth<U>;
  Buffer<U> q_columns, q_rows, dout_columns, dout_rows;  // units along the head or, for _rows, along queries
  Buffer<float> lse, delta, dq;                          // dq: [tile][size.rows][kQueries]
};

template <typename T>
class Backward {
  using U = Unit<T>;
  static constexpr int64_t kQueryUnits = kQueries / kDepth<U>;
  static constexpr int64_t kKeyUnits = kKeys / kDepth<U>;

 public:
  Backward(const Call<T>& call, const Gradients<T>& gradients)
      : call_(call), grads_(gradients), size_(call.shape.size), value_(call.shape.value_size) {}

  void run() const {
    const int64_t heads = call_.shape.kv_heads;
    parallel_tasks(static_cast<int64_t>(call_.sequences.size()) * heads, [&](int64_t i) { run(i / heads, i % heads); });
  }

 private:
  void run(int64_t sequence, int64_t kv_head) const {
    const Sequence& s = call_.sequences[sequence];
    const int64_t key_tiles = (s.k_len + kKeys - 1) / kKeys, query_tiles = (s.q_len + kQueries - 1) / kQueries;
    const int64_t group = call_.shape.group();
    // Sums over the heads that share these keys; with one head a single tile is enough.
    const int64_t kept_tiles = group > 1 ? key_tiles : 1;
    Buffer<float> dk(kept_tiles * kKeys * size_.lanes), dv(kept_tiles * kKeys * value_.lanes);
    Buffer<U> k_rows(kKeys * size_.depth), k_units(kKeyUnits * size_.rows), k_columns(size_.rows * kKeyUnits),
        v_rows(kKeys * value_.depth), ds_units(kKeyUnits * kQueries);
    // P^T and dS^T as rows [kKeys][kQueryUnits]: the A operands of dV and dK.
    Buffer<U> p_rows(kKeys * kQueryUnits), ds_rows(kKeys * kQueryUnits);
    Buffer<float> products(kKeys * kQueries), dp(kKeys * kQueries);
    PackedQueries<U> queries(query_tiles, size_, value_);

    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = kv_head * group + g;
      pack_queries(s, sequence, head, query_tiles, queries);
      const Dropout dropout(call_.options, call_.stream(sequence, head));
      for (int64_t t = 0; t < key_tiles; ++t) {
        const int64_t key = t * kKeys, count = std::min(kKeys, s.k_len - key);
        float* dk_tile = dk.get() + (group > 1 ? t : 0) * kKeys * size_.lanes;
        float* dv_tile = dv.get() + (group > 1 ? t : 0) * kKeys * value_.lanes;
        if (g == 0) {
          std::fill_n(dk_tile, kKeys * size_.lanes, 0.0f);
          std::fill_n(dv_tile, kKeys * value_.lanes, 0.0f);
        }
        pack_rows(call_.k.at(s.batch, s.k_start + key, kv_head), call_.k.row_stride, count, call_.shape.size,
                  k_rows.get(), kKeys, size_.depth);
        pack_rows(call_.v.at(s.batch, s.k_start + key, kv_head), call_.v.row_stride, count, call_.shape.value_size,
                  v_rows.get(), kKeys, value_.depth);
        pack_columns(call_.k.at(s.batch, s.k_start + key, kv_head), call_.k.row_stride, count, call_.shape.size,
                     k_units.get(), kKeyUnits, size_.rows);
        transpose(k_units.get(), kKeyUnits, size_.rows, k_columns.get(), kKeyUnits);

        const KeyRange seen_by = seeing_queries(s, key, key + count);
        for (int64_t q = seen_by.begin / kQueries; q * kQueries < seen_by.end; ++q) {
          tile_matmul(kKeys, size_.depth, k_rows.get(), size_.depth, &queries.q_columns[q * size_.depth * kQueries],
                      kQueries, products.get(), kQueries, false);
          tile_matmul(kKeys, value_.depth, v_rows.get(), value_.depth,
                      &queries.dout_columns[q * value_.depth * kQueries], kQueries, dp.get(), kQueries, false);
          const ScoreTile tile{call_.options, call_.alibi(sequence, head), s.k_len - s.q_len, q * kQueries, key,
                               s.k_len};
          score_gradients(tile, dropout, products.get(), dp.get(), &queries.lse[q * kQueries],
                          &queries.delta[q * kQueries], p_rows.get(), ds_rows.get(), ds_units.get());
          wide_tile_matmul(kKeys, value_.lanes / kLanes, kQueryUnits, p_rows.get(), kQueryUnits,
                           &queries.dout_rows[q * kQueryUnits * value_.lanes], value_.lanes, dv_tile, value_.lanes,
                           true);
          wide_tile_matmul(kKeys, size_.lanes / kLanes, kQueryUnits, ds_rows.get(), kQueryUnits,
                           &queries.q_rows[q * kQueryUnits * size_.lanes], size_.lanes, dk_tile, size_.lanes, true);
          tile_matmul(size_.rows, kKeyUnits, k_columns.get(), kKeyUnits, ds_units.get(), kQueries,
                      &queries.dq[q * size_.rows * kQueries], kQueries, true);
        }
        if (g == group - 1) {
          write_rows(dk_tile, size_.lanes, count, call_.shape.size, grads_.dk, s.batch, s.k_start + key, kv_head);
          write_rows(dv_tile, value_.lanes, count, call_.shape.value_size, grads_.dv, s.batch, s.k_start + key,
                     kv_head);
        }
      }
      write_dq(s, head, queries);
    }
  }

  // The queries that see any of the keys [first, last).
  KeyRange seeing_queries(const Sequence& s, int64_t first, int64_t last) const {
    const int64_t shift = s.k_len - s.q_len;
    return {std::clamp<int64_t>(first - shift - call_.options.right, 0, s.q_len),
            std::clamp<int64_t>(last - shift + call_.options.left, 0, s.q_len)};
  }

  void pack_queries(const Sequence& s, int64_t sequence, int64_t head, int64_t tiles, PackedQueries<U>& to) const {
    Buffer<U> rows(kQueries * std::max(size_.depth, value_.depth));
    double sink_gradient = 0.0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * kQueries, count = std::min(kQueries, s.q_len - first), row = s.q_start + first;
      const auto pack = [&](const Rows<const T>& x, int64_t size, const Padded<U>& padded, U* columns, U* across) {
        pack_rows(x.at(s.batch, row, head), x.row_stride, count, size, rows.get(), kQueries, padded.depth);
        transpose(rows.get(), kQueries, padded.depth, columns + t * padded.depth * kQueries, kQueries);
        pack_columns(x.at(s.batch, row, head), x.row_stride, count, size, across + t * kQueryUnits * padded.lanes,
                     kQueryUnits, padded.lanes);
      };
      pack(call_.q, call_.shape.size, size_, to.q_columns.get(), to.q_rows.get());
      pack(grads_.dout, call_.shape.value_size, value_, to.dout_columns.get(), to.dout_rows.get());
      for (int64_t i = 0; i < kQueries; ++i) {
        float lse = 0.0f, delta = 0.0f;
        if (i < count) {
          const int64_t index = call_.lse_index(s, head, first + i);
          const T* out = grads_.out.at(s.batch, row + i, head);
          const T* dout = grads_.dout.at(s.batch, row + i, head);
          Vec total{};
          for_each_vec(call_.shape.value_size, [&](auto at, auto) { total += at(out) * at(dout); });
          delta = sum(total) - (grads_.dlse == nullptr ? 0.0f : grads_.dlse[index]);
          lse = grads_.lse[index];
          if (lse == -kInfinity) {  // a query that sees nothing: its probabilities become exp(-inf - inf) = 0
            lse = kInfinity;
            delta = 0.0f;
          }
          if (grads_.dsinks != nullptr) sink_gradient -= std::exp(call_.sinks[head] - lse) * delta;
        }
        to.lse[first + i] = lse;
        to.delta[first + i] = delta;
      }
    }
    if (grads_.dsinks != nullptr) {
      grads_.dsinks[sequence * call_.shape.heads + head] = static_cast<float>(sink_gradient);
    }
    std::fill_n(to.dq.get(), tiles * size_.rows * kQueries, 0.0f);
  }

  // Products and dP of a tile -> P^T and dS^T, both as rows over queries, dS^T also in units over keys.
  void score_gradients(const ScoreTile& tile, const Dropout& dropout, const float* products, const float* dp,
                       const float* lse, const float* delta, U* p_rows, U* ds_rows, U* ds_units) const {
    const bool masked = tile.cut(), dropped = call_.options.dropout > 0.0f;
    const float keep_scale = 1.0f / (1.0f - call_.options.dropout);
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec lse_v = load(lse + v * kLanes), delta_v = load(delta + v * kLanes);
      for (int64_t j = 0; j < kKeys; j += 4) {
        IntVec keep[4];
        if (dropped) dropout.masks(tile.first_key + j, tile.first_query + v * kLanes, keep);
        Vec ds[4];
        for (int64_t r = 0; r < 4; ++r) {
          const int64_t at = (j + r) * kQueries + v * kLanes;
          Vec slope;
          const Vec score = tile.template score<true>(load(products + at), j + r, v, masked, slope);
          const Vec p = exp(score - lse_v);
          Vec p_kept = p, dp_kept = load(dp + at);
          if (dropped) {
            p_kept = keep[r] ? p * keep_scale : Vec{};
            dp_kept = keep[r] ? dp_kept * keep_scale : Vec{};
          }
          ds[r] = p * (dp_kept - delta_v) * slope;
          store_row(p_rows, j + r, v, p_kept);
          store_row(ds_rows, j + r, v, ds[r]);
        }
        for (int64_t r = 0; r < 4; r += kDepth<U>) {
          U* at = ds_units + (j + r) / kDepth<U> * kQueries + v * kLanes;
          if constexpr (kDepth<U> == 1) {
            store_unit(at, ds[r]);
          } else {
            store_unit(at, ds[r], ds[r + 1]);
          }
        }
      }
    }
  }

  // A vector of queries into a row of an A operand: units of neighbours along the row are neighbours in memory.
  static void store_row(U* rows, int64_t row, int64_t v, Vec value) {
    using Element = std::conditional_t<kDepth<U> == 1, float, T>;
    store(reinterpret_cast<Element*>(rows + row * kQueryUnits) + v * kLanes, value);
  }

  static void write_rows(const float* from, int64_t stride, int64_t rows, int64_t size, const Rows<T>& to,
                         int64_t batch, int64_t row, int64_t head) {
    for (int64_t r = 0; r < rows; ++r) {
      T* out = to.at(batch, row + r, head);
      for_each_vec(size, [&](auto at, auto put) { put(out, at(from + r * stride)); });
    }
  }

  void write_dq(const Sequence& s, int64_t head, const PackedQueries<U>& queries) const {
    Buffer<float> rows(kQueries * size_.rows);
    for (int64_t first = 0; first < s.q_len; first += kQueries) {
      transpose(&queries.dq[first * size_.rows], size_.rows, kQueries, rows.get(), size_.rows);
      write_rows(rows.get(), size_.rows, std::min(kQueries, s.q_len - first), call_.shape.size, grads_.dq, s.batch,
                 s.q_start + first, head);
    }
  }

  const Call<T>& call_;
  const Gradients<T>& grads_;
  const Padded<U> size_, value_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout_in, const std::optional<Tensor>& dlse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out_in, const Tensor& lse, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& seed, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    bool /*deterministic: always*/) {
  const Tensor dout = with_contiguous_rows(dout_in), out = with_contiguous_rows(out_in);
  const std::optional<Tensor> dlse = as_contiguous(dlse_in);
  Tensor dq = new_output(q, q.sizes()), dk = new_output(k, k.sizes()), dv = new_output(v, v.sizes());
  const int64_t heads = q.size(-2);
  Tensor dsinks = torch::stable::new_empty(q, {sinks.has_value() ? heads : 0}, ScalarType::Float);
  dispatch_floating(q.scalar_type(), [&]<typename T>() {
    const Call<T> call(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks,
                       make_options(scale, window_left, window_right, softcap, dropout_p, seed));
    std::vector<float> dsinks_by_sequence(sinks.has_value() ? call.sequences.size() * heads : 0);
    const Gradients<T> gradients{rows_of<const T>(out),
                                 rows_of<const T>(dout),
                                 lse.const_data_ptr<float>(),
                                 data_or_null<float>(dlse),
                                 rows_of<T>(dq),
                                 rows_of<T>(dk),
                                 rows_of<T>(dv),
                                 sinks.has_value() ? dsinks_by_sequence.data() : nullptr};
    Backward<T>(call, gradients).run();
    for (int64_t head = 0; head < dsinks.numel(); ++head) {
      float& total = dsinks.mutable_data_ptr<float>()[head] = 0.0f;
      for (size_t i = head; i < dsinks_by_sequence.size(); i += heads) total += dsinks_by_sequence[i];
    }
  });
  return {dq, dk, dv, dsinks};
}

MEMKERNELS_CPU_KERNEL(attention_bwd);

}  // namespace
}  // namespace memkernels::cpu
