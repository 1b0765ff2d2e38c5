// Attention forward: O = softmax(S) V with S = score(Q K^T), tile by tile with a running maximum and sum.
#include <tuple>

#include "common/kernel_table.h"
#include "cpu/attention_call.h"
#include "cpu/attention_common.h"
#include "cpu/outputs.h"

namespace memkernels::cpu {
namespace {

// Tiles of queries of one task, at most: enough that packing K and V for it costs little.
constexpr int64_t kTaskTiles = 16;

struct Task {
  int64_t sequence, kv_head, first, last;  // queries [first, last)
};

template <typename T>
class Forward {
  using U = Unit<T>;

 public:
  Forward(const Call<T>& call, const Rows<T>& out, float* lse) : call_(call), out_(out), lse_(lse) {}

  void run() const {
    const int64_t queries = task_queries();
    std::vector<Task> tasks;
    for (size_t s = 0; s < call_.sequences.size(); ++s) {
      // The last queries see the most keys under a causal mask: they go first.
      const int64_t length = call_.sequences[s].q_len;
      for (int64_t last = length; last > 0; last = (last - 1) / queries * queries) {
        for (int64_t head = 0; head < call_.shape.kv_heads; ++head) {
          tasks.push_back({static_cast<int64_t>(s), head, (last - 1) / queries * queries, last});
        }
      }
    }
    parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) { run(tasks[i]); });
  }

 private:
  // Queries of one task: few enough that every thread finds two.
  int64_t task_queries() const {
    int64_t tiles = 0;
    for (const Sequence& s : call_.sequences) tiles += (s.q_len + kQueries - 1) / kQueries;
    const int64_t share = tiles * call_.shape.kv_heads / (2 * torch::stable::get_num_threads());
    return std::clamp<int64_t>(share, 1, kTaskTiles) * kQueries;
  }

  void run(const Task& task) const {
    const TileRegisters registers;
    const Sequence& s = call_.sequences[task.sequence];
    const Padded<U> size(call_.shape.size), value(call_.shape.value_size);
    const KeyRange keys = visible_keys(call_.options, s, task.first, task.last);
    const int64_t first_tile = keys.begin / kKeys,
                  tiles = std::max<int64_t>(0, (keys.end + kKeys - 1) / kKeys - first_tile);
    constexpr int64_t key_units = kKeys / kDepth<U>;

    // K as rows [kKeys][depth]; V^T as rows [value][key_units]: the A operands of both products.
    Buffer<U> k(tiles * kKeys * size.depth), v(tiles * value.rows * key_units), columns(key_units * value.rows);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t key = (first_tile + t) * kKeys, count = std::min(kKeys, s.k_len - key);
      pack_rows(call_.k.at(s.batch, s.k_start + key, task.kv_head), call_.k.row_stride, count, call_.shape.size,
                &k[t * kKeys * size.depth], kKeys, size.depth);
      pack_columns(call_.v.at(s.batch, s.k_start + key, task.kv_head), call_.v.row_stride, count,
                   call_.shape.value_size, columns.get(), key_units, value.rows);
      transpose(columns.get(), value.rows, key_units, value.rows, &v[t * value.rows * key_units], key_units);
    }

    Buffer<U> q_rows(kQueries * size.depth), q(size.depth * kQueries), p(key_units * kQueries);
    Buffer<float> scores(kKeys * kQueries), o(value.rows * kQueries);
    for (int64_t head = task.kv_head * call_.shape.group(); head < (task.kv_head + 1) * call_.shape.group(); ++head) {
      for (int64_t first = task.first; first < task.last; first += kQueries) {
        const int64_t count = std::min(kQueries, task.last - first);
        pack_rows(call_.q.at(s.batch, s.q_start + first, head), call_.q.row_stride, count, call_.shape.size,
                  q_rows.get(), kQueries, size.depth);
        transpose(q_rows.get(), size.depth, kQueries, size.depth, q.get(), kQueries);
        std::fill_n(o.get(), value.rows * kQueries, 0.0f);

        Vec largest[kVecs], sum[kVecs] = {};
        for (Vec& m : largest) m = broadcast(-kInfinity);
        const KeyRange seen = visible_keys(call_.options, s, first, first + count);
        const Dropout dropout(call_.options, call_.stream(task.sequence, head));
        for (int64_t t = seen.begin / kKeys; t * kKeys < seen.end; ++t) {
          const int64_t packed = t - first_tile;
          tile_matmul(kKeys, size.depth, &k[packed * kKeys * size.depth], size.depth, q.get(), kQueries, scores.get(),
                      kQueries, false);
          const ScoreTile tile{call_.options, call_.alibi(task.sequence, head), s.k_len - s.q_len, first, t * kKeys,
                               s.k_len};
          softmax_tile(tile, dropout, scores.get(), p.get(), o.get(), value.rows, largest, sum);
          tile_matmul(value.rows, key_units, &v[packed * value.rows * key_units], key_units, p.get(), kQueries, o.get(),
                      kQueries, true);
        }
        finish(s, head, first, count, largest, sum, o.get());
      }
    }
  }

  // scores -> probabilities in units for the product with V^T; o is rescaled where the maximum moved.
  void softmax_tile(const ScoreTile& tile, const Dropout& dropout, float* scores, U* p, float* o, int64_t value_rows,
                    Vec* largest, Vec* sum) const {
    const bool masked = tile.cut();
    // Scores that are products times a factor above zero are made of them where they are used, in one instruction.
    const bool plain = !masked && tile.alibi == 0.0f && call_.options.softcap <= 0.0f && call_.options.scale > 0.0f;
    const float scale = plain ? call_.options.scale : 1.0f;
    Vec shift[kVecs];
    for (int64_t v = 0; v < kVecs; ++v) {
      Vec m = largest[v], unused;
      if (plain) {
        Vec top = broadcast(-kInfinity);
        for (int64_t j = 0; j < kKeys; ++j) top = max(top, load(scores + j * kQueries + v * kLanes));
        m = max(m, top * scale);
      } else {
        for (int64_t j = 0; j < kKeys; ++j) {
          float* at = scores + j * kQueries + v * kLanes;
          const Vec s = tile.template score<false>(load(at), j, v, masked, unused);
          store(at, s);
          m = max(m, s);
        }
      }
      shift[v] = m == -kInfinity ? Vec{} : m;
      const IntVec moved = m != largest[v];
      if (any(moved)) {
        const Vec factor = exp(largest[v] - shift[v]);
        sum[v] *= factor;
        for (int64_t d = 0; d < value_rows; ++d) {
          float* at = o + d * kQueries + v * kLanes;
          store(at, load(at) * factor);
        }
        largest[v] = m;
      }
      sum[v] = probabilities(tile, dropout, scores, scale, p, v, shift[v], sum[v]);
    }
  }

  // Of scores * scale; writes them in units, and returns `sum` with them added.
  Vec probabilities(const ScoreTile& tile, const Dropout& dropout, const float* scores, float scale, U* p, int64_t v,
                    Vec shift, Vec sum) const {
    for (int64_t j = 0; j < kKeys; j += 4) {
      Vec probability[4];
      for (int64_t r = 0; r < 4; ++r) {
        probability[r] = exp(load(scores + (j + r) * kQueries + v * kLanes) * scale - shift);
        sum += probability[r];
      }
      if (call_.options.dropout > 0.0f) {
        IntVec keep[4];
        dropout.masks(tile.first_key + j, tile.first_query + v * kLanes, keep);
        for (int r = 0; r < 4; ++r) probability[r] = keep[r] ? probability[r] : Vec{};
      }
      for (int64_t r = 0; r < 4; r += kDepth<U>) {
        U* at = p + (j + r) / kDepth<U> * kQueries + v * kLanes;
        if constexpr (kDepth<U> == 1) {
          store_unit(at, probability[r]);
        } else {
          store_unit(at, probability[r], probability[r + 1]);
        }
      }
    }
    return sum;
  }

  // out = o / sum, lse = largest + log(sum); rows that see nothing are 0 and -inf.
  void finish(const Sequence& s, int64_t head, int64_t first, int64_t count, const Vec* largest, const Vec* sum,
              const float* o) const {
    const float kept = 1.0f - call_.options.dropout;
    float scale[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      float m = largest[i / kLanes][i % kLanes], total = sum[i / kLanes][i % kLanes], factor = 1.0f;
      if (call_.sinks != nullptr) {
        const float sink = call_.sinks[head], top = std::max(m, sink);
        factor = m == -kInfinity ? 0.0f : std::exp(m - top);
        total = total * factor + std::exp(sink - top);
        m = top;
      }
      scale[i] = total == 0.0f ? 0.0f : factor / (total * kept);
      lse_[call_.lse_index(s, head, first + i)] = total == 0.0f ? -kInfinity : m + std::log(total);
    }
    const int64_t size = call_.shape.value_size;
    for (int64_t i = 0; i < count; ++i) {
      T* to = out_.at(s.batch, s.q_start + first + i, head);
      for (int64_t d = 0; d < size; ++d) to[d] = static_cast<T>(o[d * kQueries + i] * scale[i]);
    }
  }

  const Call<T>& call_;
  const Rows<T> out_;
  float* lse_;
};

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& cu_seqlens_q,
                                         const std::optional<Tensor>& cu_seqlens_k,
                                         const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
                                         const std::optional<Tensor>& seed, int64_t /*max_seqlen_q*/,
                                         int64_t /*max_seqlen_k*/, double scale, int64_t window_left,
                                         int64_t window_right, double softcap, double dropout_p) {
  check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, dropout_p);
  Tensor out = new_output(q, output_sizes(q, v.size(-1)));
  Tensor lse = torch::stable::new_empty(q, lse_sizes(q), ScalarType::Float);
  dispatch_floating("q", q, [&]<typename T>() {
    const Call<T> call(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks,
                       make_options(scale, window_left, window_right, softcap, dropout_p, seed));
    Forward<T>(call, rows_of<T>(out), lse.mutable_data_ptr<float>()).run();
  });
  return {out, lse};
}

MEMKERNELS_CPU_KERNEL(attention_fwd);

}  // namespace
}  // namespace memkernels::cpu
