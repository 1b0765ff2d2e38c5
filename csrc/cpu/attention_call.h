// The arguments of attention's operators, unpacked once for forward and backward.
#pragma once

#include "common/checks.h"
#include "cpu/attention_common.h"

namespace memkernels::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
Rows<T> rows_of(const Tensor& t) {
  T* data = const_cast<T*>(t.const_data_ptr<std::remove_const_t<T>>());
  if (t.dim() == 3) return {data, 0, t.stride(0), t.stride(1)};
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}

inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.stride(-1) == 1 ? t : as_contiguous(t);
}

inline std::vector<int64_t> output_sizes(const Tensor& q, int64_t size) {
  std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
  sizes.back() = size;
  return sizes;
}

// (B, H, S), or packed (H, T).
inline std::vector<int64_t> lse_sizes(const Tensor& q) {
  if (q.dim() == 3) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(2), q.size(1)};
}

inline Options make_options(double scale, int64_t left, int64_t right, double softcap, double dropout,
                            const std::optional<Tensor>& seed) {
  return {.scale = static_cast<float>(scale),
          .softcap = static_cast<float>(softcap),
          .dropout = static_cast<float>(dropout),
          .left = left < 0 ? kUnlimited : std::min(left, kUnlimited),
          .right = right < 0 ? kUnlimited : std::min(right, kUnlimited),
          .seed = seed.has_value() ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0};
}

inline void check_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                            const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
                            const std::optional<Tensor>& seed, double dropout_p) {
  const bool packed = cu_seqlens_q.has_value();
  const int64_t dims = packed ? 3 : 4;
  check_dim("q", q, dims);
  check_dim("k", k, dims);
  check_dim("v", v, dims);
  const int64_t heads = q.size(-2), kv_heads = k.size(-2);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k: expected a number of heads that divides q's ", heads,
                  ", got ", kv_heads);
  std::vector<int64_t> sizes = output_sizes(k, q.size(-1));
  if (!packed) sizes[0] = q.size(0);
  check_tensor("k", k, q.scalar_type(), sizes);
  sizes.back() = v.size(-1);
  check_tensor("v", v, q.scalar_type(), sizes);
  STD_TORCH_CHECK(cu_seqlens_k.has_value() == packed, "cu_seqlens_k: expected with cu_seqlens_q, and only then");
  if (packed) {
    check_dim("cu_seqlens_q", *cu_seqlens_q, 1);
    check_dtype("cu_seqlens_q", *cu_seqlens_q, ScalarType::Int);
    check_tensor("cu_seqlens_k", *cu_seqlens_k, ScalarType::Int, cu_seqlens_q->sizes());
  }
  if (alibi_slopes.has_value() && alibi_slopes->dim() == 2) {
    const int64_t sequences = packed ? cu_seqlens_q->numel() - 1 : q.size(0);
    check_tensor("alibi_slopes", *alibi_slopes, ScalarType::Float, {sequences, heads});
  } else {
    check_tensor("alibi_slopes", alibi_slopes, ScalarType::Float, {heads});
  }
  check_tensor("sinks", sinks, ScalarType::Float, {heads});
  if (seed.has_value()) check_one_element("seed", *seed, ScalarType::Long);
  check_probability("dropout_p", dropout_p);
}

// A row outside every sequence would be left unwritten.
inline void check_starts(const char* name, const int32_t* starts, int64_t count, int64_t rows) {
  STD_TORCH_CHECK(count > 0 && starts[0] == 0 && starts[count - 1] == rows && std::is_sorted(starts, starts + count),
                  name, ": expected starts that rise from 0 to ", rows, ", the number of rows");
}

inline std::vector<Sequence> sequences_of(const Tensor& q, const Tensor& k, const std::optional<Tensor>& cu_seqlens_q,
                                          const std::optional<Tensor>& cu_seqlens_k) {
  std::vector<Sequence> sequences;
  if (!cu_seqlens_q.has_value()) {
    for (int64_t b = 0; b < q.size(0); ++b) sequences.push_back({b, 0, q.size(1), 0, k.size(1)});
    return sequences;
  }
  const Tensor tensor_q = as_contiguous(*cu_seqlens_q), tensor_k = as_contiguous(*cu_seqlens_k);
  const int32_t* starts_q = tensor_q.const_data_ptr<int32_t>();
  const int32_t* starts_k = tensor_k.const_data_ptr<int32_t>();
  check_starts("cu_seqlens_q", starts_q, tensor_q.numel(), q.size(0));
  check_starts("cu_seqlens_k", starts_k, tensor_k.numel(), k.size(0));
  for (int64_t b = 0; b + 1 < tensor_q.numel(); ++b)
    sequences.push_back({0, starts_q[b], starts_q[b + 1] - starts_q[b], starts_k[b], starts_k[b + 1] - starts_k[b]});
  return sequences;
}

template <typename T>
struct Call {
  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::optional<Tensor>& cu_seqlens_q,
       const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes_in,
       const std::optional<Tensor>& sinks_in, const Options& options_in)
      : tensors{with_contiguous_rows(q_in), with_contiguous_rows(k_in), with_contiguous_rows(v_in)},
        q(rows_of<const T>(tensors[0])),
        k(rows_of<const T>(tensors[1])),
        v(rows_of<const T>(tensors[2])),
        slopes_tensor(as_contiguous(alibi_slopes_in)),
        sinks_tensor(as_contiguous(sinks_in)),
        slopes(data_or_null<float>(slopes_tensor)),
        sinks(data_or_null<float>(sinks_tensor)),
        slopes_by_sequence(alibi_slopes_in.has_value() && alibi_slopes_in->dim() == 2),
        options(options_in),
        shape{q_in.size(-2), k_in.size(-2), q_in.size(-1), v_in.size(-1)},
        packed_rows(q_in.dim() == 3 ? q_in.size(0) : -1),
        rows(q_in.dim() == 3 ? 0 : q_in.size(1)),
        sequences(sequences_of(q_in, k_in, cu_seqlens_q, cu_seqlens_k)) {}

  // (H,) or (B, H) slopes; 0 without.
  float alibi(int64_t sequence, int64_t head) const {
    if (slopes == nullptr) return 0.0f;
    return slopes[slopes_by_sequence ? sequence * shape.heads + head : head];
  }

  int64_t stream(int64_t sequence, int64_t head) const { return sequence * shape.heads + head; }

  int64_t lse_index(const Sequence& s, int64_t head, int64_t query) const {
    if (packed_rows >= 0) return head * packed_rows + s.q_start + query;
    return (s.batch * shape.heads + head) * rows + query;
  }

  Tensor tensors[3];
  Rows<const T> q, k, v;
  std::optional<Tensor> slopes_tensor, sinks_tensor;
  const float *slopes, *sinks;
  bool slopes_by_sequence;
  Options options;
  Shape shape;
  int64_t packed_rows, rows;
  std::vector<Sequence> sequences;
};

}  // namespace CPU_CAPABILITY
}  // namespace memkernels::cpu
