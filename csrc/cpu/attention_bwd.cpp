// Attention backward. With P = exp(S - lse), delta = rowsum(dO * O) - dlse and slope = d S / d (Q K^T):
//   dV = P^T dO      dS = P * (dO V^T - delta) * slope      dQ = dS K      dK = dS^T Q
// P and dO V^T are those of dropout where there is dropout. A tile of keys owns its dK and dV. Neighbouring tiles, a
// run, walk the queries that see them together, so that what is packed of a query comes from afar once a run. To dQ of
// a query the tiles add in the order of the keys, each after the one before it: no sums by atomics, and the same result
// bit for bit for any number of threads.
#include <numeric>
#include <thread>
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

// What the packed queries of all heads at work may take. One head at a time may take more.
constexpr int64_t kHeadsBytes = 48 << 20;

// Tiles of a run: at most so many, and what a thread holds of them stays in its cache.
constexpr int64_t kRunTiles = 4, kRunBytes = 512 << 10;

// What all queries of one head bring to the products, packed once: tile t starts at t * (its size).
template <typename U>
struct PackedQueries {
  static constexpr int64_t kUnits = kQueries / kDepth<U>;

  PackedQueries(int64_t tiles, const Padded<U>& size, const Padded<U>& value)
      : q_columns(tiles * size.depth * kQueries),
        q_rows(tiles * kUnits * size.lanes),
        dout_columns(tiles * value.depth * kQueries),
        dout_rows(tiles * kUnits * value.lanes),
        lse(tiles * kQueries),
        delta(tiles * kQueries),
        dq(tiles * size.rows * kQueries) {}

  static int64_t bytes(int64_t queries, const Padded<U>& size, const Padded<U>& value) {
    const int64_t units = size.depth + size.lanes / kDepth<U> + value.depth + value.lanes / kDepth<U>;
    return round_up(queries, kQueries) * (units * sizeof(U) + (size.rows + 2) * sizeof(float));
  }

  Buffer<U> q_columns, q_rows, dout_columns, dout_rows;  // units along the head or, for _rows, along queries
  Buffer<float> lse, delta, dq;                          // dq: [tile][size.rows][kQueries]
};

// What a thread holds of a tile of keys that it is at.
template <typename U>
struct KeyTile {
  static constexpr int64_t kUnits = kKeys / kDepth<U>;

  KeyTile(const Padded<U>& size, const Padded<U>& value)
      : k_rows(kKeys * size.depth),
        k_units(kUnits * size.rows),
        k_columns(size.rows * kUnits),
        v_rows(kKeys * value.depth),
        dk(kKeys * size.lanes),
        dv(kKeys * value.lanes) {}

  static int64_t bytes(const Padded<U>& size, const Padded<U>& value) {
    const int64_t units = kKeys * (size.depth + value.depth) + 2 * kUnits * size.rows;
    return units * sizeof(U) + kKeys * (size.lanes + value.lanes) * sizeof(float);
  }

  Buffer<U> k_rows, k_units, k_columns, v_rows;
  Buffer<float> dk, dv;
};

// What a thread holds of a run: its tiles, and what is made of one of them and a tile of queries.
template <typename U>
struct KeyRun {
  static constexpr int64_t kUnits = kKeys / kDepth<U>, kQueryUnits = kQueries / kDepth<U>;

  KeyRun(int64_t count, const Padded<U>& size, const Padded<U>& value)
      : p_rows(kKeys * kQueryUnits),
        ds_rows(kKeys * kQueryUnits),
        ds_units(kUnits * kQueries),
        products(kKeys * kQueries),
        dp(kKeys * kQueries) {
    tiles.reserve(count);
    for (int64_t t = 0; t < count; ++t) tiles.emplace_back(size, value);
  }

  std::vector<KeyTile<U>> tiles;
  Buffer<U> p_rows, ds_rows, ds_units;  // P^T and dS^T as rows, the A operands of dV and dK; dS^T as dQ's B
  Buffer<float> products, dp;
};

// The order in which runs come to a tile of queries. They are begun in order, so the first that is not finished waits
// for none.
class RunOrder {
 public:
  explicit RunOrder(int64_t runs) : passed_(runs) {}

  // Until the run before this one, and so all before, have passed the tile of queries.
  void wait(int64_t run, int64_t query_tile) const {
    if (run == 0) return;
    while (passed_[run - 1].load(std::memory_order_acquire) <= query_tile) std::this_thread::yield();
  }
  void pass(int64_t run, int64_t query_tile) { passed_[run].store(query_tile + 1, std::memory_order_release); }
  void finish(int64_t run) { pass(run, kUnlimited); }

 private:
  std::vector<std::atomic<int64_t>> passed_;
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
    const int64_t heads = call_.shape.kv_heads, tasks = static_cast<int64_t>(call_.sequences.size()) * heads;
    int64_t longest = 0;
    for (const Sequence& s : call_.sequences) longest = std::max(longest, s.q_len);
    // A parallel region within another is serial: a head is one thread's or all threads'. The first is faster, for no
    // tile of dQ then goes from core to core, but needs a head for each thread, and memory for each such head.
    const int64_t threads = torch::stable::get_num_threads();
    if (tasks >= threads && threads * PackedQueries<U>::bytes(longest, size_, value_) <= kHeadsBytes) {
      return parallel_tasks(tasks, [&](int64_t i) { run(i / heads, i % heads, 1); });
    }
    for (int64_t i = 0; i < tasks; ++i) run(i / heads, i % heads, threads);
  }

 private:
  void run(int64_t sequence, int64_t kv_head, int64_t threads) const {
    const Sequence& s = call_.sequences[sequence];
    const int64_t key_tiles = (s.k_len + kKeys - 1) / kKeys, query_tiles = (s.q_len + kQueries - 1) / kQueries;
    // As many tiles a run as the cache holds, but two runs for each of several threads.
    const int64_t held = std::clamp<int64_t>(kRunBytes / KeyTile<U>::bytes(size_, value_), 1, kRunTiles);
    const int64_t run_tiles = threads == 1 ? held : std::clamp<int64_t>(key_tiles / (2 * threads), 1, held);
    const int64_t group = call_.shape.group();
    // Sums over the heads that share these keys; those of one head alone stay in its KeyTile.
    const int64_t kept_tiles = group > 1 ? key_tiles : 0;
    Buffer<float> dk(kept_tiles * kKeys * size_.lanes), dv(kept_tiles * kKeys * value_.lanes);
    PackedQueries<U> queries(query_tiles, size_, value_);

    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = kv_head * group + g, runs = (key_tiles + run_tiles - 1) / run_tiles;
      pack_queries(s, sequence, head, query_tiles, queries);
      RunOrder order(runs);
      const auto make_run = [&] { return KeyRun<U>(run_tiles, size_, value_); };
      parallel_tasks(runs, make_run, [&](KeyRun<U>& of, int64_t r) {
        const int64_t first = r * run_tiles, count = std::min(run_tiles, key_tiles - first);
        Sums sums[kRunTiles];
        for (int64_t t = 0; t < count; ++t) {
          const int64_t tile = first + t;
          sums[t] = group > 1 ? Sums{&dk[tile * kKeys * size_.lanes], &dv[tile * kKeys * value_.lanes]}
                              : Sums{of.tiles[t].dk.get(), of.tiles[t].dv.get()};
          if (g == 0) {
            std::fill_n(sums[t].dk, kKeys * size_.lanes, 0.0f);
            std::fill_n(sums[t].dv, kKeys * value_.lanes, 0.0f);
          }
          pack_keys(s, kv_head, tile, of.tiles[t]);
        }
        add_gradients(s, sequence, head, r, first, count, queries, order, of, sums);
        for (int64_t t = 0; t < count && g == group - 1; ++t) {
          const int64_t key = (first + t) * kKeys, rows = std::min(kKeys, s.k_len - key);
          write_rows(sums[t].dk, size_.lanes, rows, call_.shape.size, grads_.dk, s.batch, s.k_start + key, kv_head);
          write_rows(sums[t].dv, value_.lanes, rows, call_.shape.value_size, grads_.dv, s.batch, s.k_start + key,
                     kv_head);
        }
      });
      write_dq(s, head, query_tiles, queries);
    }
  }

  struct Sums {
    float *dk, *dv;
  };

  void pack_keys(const Sequence& s, int64_t kv_head, int64_t tile, KeyTile<U>& to) const {
    const int64_t key = tile * kKeys, count = std::min(kKeys, s.k_len - key);
    const T* k = call_.k.at(s.batch, s.k_start + key, kv_head);
    const T* v = call_.v.at(s.batch, s.k_start + key, kv_head);
    pack_rows(k, call_.k.row_stride, count, call_.shape.size, to.k_rows.get(), kKeys, size_.depth);
    pack_rows(v, call_.v.row_stride, count, call_.shape.value_size, to.v_rows.get(), kKeys, value_.depth);
    pack_columns(k, call_.k.row_stride, count, call_.shape.size, to.k_units.get(), kKeyUnits, size_.rows);
    transpose(to.k_units.get(), size_.rows, kKeyUnits, size_.rows, to.k_columns.get(), kKeyUnits);
  }

  // What a run of `count` tiles from `first` on and one head's queries give to dK, dV and dQ.
  void add_gradients(const Sequence& s, int64_t sequence, int64_t head, int64_t run, int64_t first, int64_t count,
                     const PackedQueries<U>& queries, RunOrder& order, KeyRun<U>& of, const Sums* sums) const {
    const TileRegisters registers;
    const Dropout dropout(call_.options, call_.stream(sequence, head));
    KeyRange seen_by[kRunTiles];
    for (int64_t t = 0; t < count; ++t) seen_by[t] = seeing_queries(s, (first + t) * kKeys);
    const int64_t last = seen_by[count - 1].end;
    for (int64_t q = seen_by[0].begin / kQueries; q * kQueries < last; ++q) {
      for (int64_t t = 0; t < count; ++t) {
        if (q < seen_by[t].begin / kQueries || q * kQueries >= seen_by[t].end) continue;
        const ScoreTile tile{call_.options, call_.alibi(sequence, head), s.k_len - s.q_len,
                             q * kQueries,  (first + t) * kKeys,         s.k_len};
        add_to_keys(tile, dropout, q, queries, of, of.tiles[t], sums[t]);
        order.wait(run, q);
        tile_matmul(size_.rows, kKeyUnits, of.tiles[t].k_columns.get(), kKeyUnits, of.ds_units.get(), kQueries,
                    &queries.dq[q * size_.rows * kQueries], kQueries, true);
      }
      order.pass(run, q);
    }
    order.finish(run);
  }

  // What a tile of queries gives to dK and dV of a tile of keys; leaves dS^T.
  void add_to_keys(const ScoreTile& tile, const Dropout& dropout, int64_t q, const PackedQueries<U>& queries,
                   KeyRun<U>& of, const KeyTile<U>& keys, const Sums& sums) const {
    tile_matmul(kKeys, size_.depth, keys.k_rows.get(), size_.depth, &queries.q_columns[q * size_.depth * kQueries],
                kQueries, of.products.get(), kQueries, false);
    tile_matmul(kKeys, value_.depth, keys.v_rows.get(), value_.depth,
                &queries.dout_columns[q * value_.depth * kQueries], kQueries, of.dp.get(), kQueries, false);
    score_gradients(tile, dropout, of.products.get(), of.dp.get(), &queries.lse[q * kQueries],
                    &queries.delta[q * kQueries], of.p_rows.get(), of.ds_rows.get(), of.ds_units.get());
    wide_tile_matmul(kKeys, value_.lanes / kLanes, kQueryUnits, of.p_rows.get(), kQueryUnits,
                     &queries.dout_rows[q * kQueryUnits * value_.lanes], value_.lanes, sums.dv, value_.lanes, true);
    wide_tile_matmul(kKeys, size_.lanes / kLanes, kQueryUnits, of.ds_rows.get(), kQueryUnits,
                     &queries.q_rows[q * kQueryUnits * size_.lanes], size_.lanes, sums.dk, size_.lanes, true);
  }

  // The queries that see any key of the tile from `first` on.
  KeyRange seeing_queries(const Sequence& s, int64_t first) const {
    const int64_t shift = s.k_len - s.q_len, last = std::min(first + kKeys, s.k_len);
    return {std::clamp<int64_t>(first - shift - call_.options.right, 0, s.q_len),
            std::clamp<int64_t>(last - shift + call_.options.left, 0, s.q_len)};
  }

  void pack_queries(const Sequence& s, int64_t sequence, int64_t head, int64_t tiles, PackedQueries<U>& to) const {
    std::vector<double> sink_gradients(tiles);
    const auto make_rows = [&] { return Buffer<U>(kQueries * std::max(size_.depth, value_.depth)); };
    parallel_tasks(tiles, make_rows, [&](const Buffer<U>& rows, int64_t t) {
      const int64_t first = t * kQueries, count = std::min(kQueries, s.q_len - first), row = s.q_start + first;
      const auto pack = [&](const Rows<const T>& x, int64_t size, const Padded<U>& padded, U* columns, U* across) {
        pack_rows(x.at(s.batch, row, head), x.row_stride, count, size, rows.get(), kQueries, padded.depth);
        transpose(rows.get(), padded.depth, kQueries, padded.depth, columns + t * padded.depth * kQueries, kQueries);
        pack_columns(x.at(s.batch, row, head), x.row_stride, count, size, across + t * kQueryUnits * padded.lanes,
                     kQueryUnits, padded.lanes);
      };
      pack(call_.q, call_.shape.size, size_, to.q_columns.get(), to.q_rows.get());
      pack(grads_.dout, call_.shape.value_size, value_, to.dout_columns.get(), to.dout_rows.get());
      for (int64_t i = 0; i < kQueries; ++i) {
        // Of a query that sees nothing, or of none: its probabilities become exp(score - inf) = 0.
        float lse = kInfinity, delta = 0.0f;
        const int64_t index = i < count ? call_.lse_index(s, head, first + i) : -1;
        if (index >= 0 && grads_.lse[index] != -kInfinity) {
          const T* out = grads_.out.at(s.batch, row + i, head);
          const T* dout = grads_.dout.at(s.batch, row + i, head);
          Vec total{};
          for_each_vec(call_.shape.value_size, [&](auto at, auto) { total += at(out) * at(dout); });
          delta = sum(total) - (grads_.dlse == nullptr ? 0.0f : grads_.dlse[index]);
          lse = grads_.lse[index];
          if (grads_.dsinks != nullptr) sink_gradients[t] -= std::exp(call_.sinks[head] - lse) * delta;
        }
        to.lse[first + i] = lse;
        to.delta[first + i] = delta;
      }
      std::fill_n(&to.dq[t * size_.rows * kQueries], size_.rows * kQueries, 0.0f);
    });
    if (grads_.dsinks != nullptr) {
      const double total = std::accumulate(sink_gradients.begin(), sink_gradients.end(), 0.0);
      grads_.dsinks[sequence * call_.shape.heads + head] = static_cast<float>(total);
    }
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

  void write_dq(const Sequence& s, int64_t head, int64_t tiles, const PackedQueries<U>& queries) const {
    const auto make_rows = [&] { return Buffer<float>(kQueries * size_.rows); };
    parallel_tasks(tiles, make_rows, [&](const Buffer<float>& rows, int64_t t) {
      const int64_t first = t * kQueries;
      transpose(&queries.dq[first * size_.rows], kQueries, size_.rows, kQueries, rows.get(), size_.rows);
      write_rows(rows.get(), size_.rows, std::min(kQueries, s.q_len - first), call_.shape.size, grads_.dq, s.batch,
                 s.q_start + first, head);
    });
  }

  const Call<T>& call_;
  const Gradients<T>& grads_;
  const Padded<U> size_, value_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout_in, const std::optional<Tensor>& dlse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out_in, const Tensor& lse_in, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& seed, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    bool /*deterministic: always*/) {
  check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, dropout_p);
  check_tensor("dout", dout_in, q.scalar_type(), output_sizes(q, v.size(-1)));
  check_tensor("out", out_in, q.scalar_type(), output_sizes(q, v.size(-1)));
  check_tensor("lse", lse_in, ScalarType::Float, lse_sizes(q));
  check_tensor("dlse", dlse_in, ScalarType::Float, lse_sizes(q));
  const Tensor dout = with_contiguous_rows(dout_in), out = with_contiguous_rows(out_in), lse = as_contiguous(lse_in);
  const std::optional<Tensor> dlse = as_contiguous(dlse_in);
  Tensor dq = new_output(q, q.sizes()), dk = new_output(k, k.sizes()), dv = new_output(v, v.sizes());
  const int64_t heads = q.size(-2);
  Tensor dsinks = torch::stable::new_empty(q, {sinks.has_value() ? heads : 0}, ScalarType::Float);
  dispatch_floating("q", q, [&]<typename T>() {
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
