// The attention family as torch ops: check, allocate, call. One template serves the CPU and the CUDA library; a Backend says
// how to run a kernel (`static void run(const Args&, const Tensor& on)`).
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/torch/tensor.h"
#include "effcore/attention.h"

namespace effcore::binding {

// Whether a group's owner keeps the probabilities or only their log-sum-exp (schema argument `keep`).
enum class Keep : std::int64_t { lse = 0, probs = 1 };

using OptionalTensor = std::optional<Tensor>;

// Views of the optional visibility tensors live as long as the Options that point to them.
struct VisibilityViews {
  std::optional<TensorView> lengths, first_key;
  attention::Options options;

  VisibilityViews(const char* function, const OptionalTensor& lengths_, const OptionalTensor& first_key_, bool causal,
                  std::optional<double> scale) {
    if (lengths_) lengths = view(*lengths_, function, "lengths");
    if (first_key_) first_key = view(*first_key_, function, "first_key");
    options = {causal, scale, lengths ? &*lengths : nullptr, first_key ? &*first_key : nullptr};
  }
  VisibilityViews(const VisibilityViews&) = delete;
};

template <class Backend>
struct AttentionOps {
  using Problem = attention::Problem;

  static Tensor statistics(const Tensor& q, const Problem& p) {
    return empty(q, {p.batch, p.heads, p.queries}, accumulate_type(q.scalar_type()));
  }
  static Tensor output(const Tensor& q, const Problem& p) {
    return empty_heads(q, p.batch, p.heads, p.queries, p.value_dim, q.scalar_type());
  }
  static DType statistics_type(const Problem& p) { return p.dtype == DType::float64 ? DType::float64 : DType::float32; }

  // A contiguous [B, heads, queries] tensor of statistics, checked.
  static void* statistics_data(const char* function, const char* argument, const Tensor& t, const Problem& p) {
    attention::check_tensor(function, argument, view(t, function, argument), p, statistics_type(p),
                            {p.batch, p.heads, p.queries});
    check(t.is_contiguous(), function, argument, " must be contiguous");
    return const_cast<void*>(t.const_data_ptr());
  }
  // Packed probabilities, or null where `probs` is the empty tensor that stands for "not kept".
  static void* probs_data(const char* function, const Tensor& probs, const Problem& p) {
    if (probs.dim() == 1 && probs.numel() == 0) return nullptr;
    attention::check_tensor(function, "probs", view(probs, function, "probs"), p, p.dtype,
                            {p.batch, p.heads, attention::probs_elements(p.queries, p.keys, p.causal)});
    check(probs.is_contiguous(), function, "probs must be contiguous");
    return const_cast<void*>(probs.const_data_ptr());
  }
  static TensorView output_view(const char* function, const char* argument, const Tensor& t, const Problem& p) {
    const TensorView v = view(t, function, argument);
    attention::check_tensor(function, argument, v, p, p.dtype, {p.batch, p.heads, p.queries, p.value_dim});
    return v;
  }
  // A gradient comes as autograd made it (an expanded scalar, a transposed view): the kernels want a contiguous last dimension.
  static Tensor dense_last(const Tensor& t) {
    return t.dim() == 4 && t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& lengths,
                                            const OptionalTensor& first_key, bool causal, std::optional<double> scale) {
    auto [out, lse, probs] = run_forward("attention", q, k, v, lengths, first_key, causal, scale, Keep::lse);
    return {out, lse};
  }

  static std::tuple<Tensor, Tensor, Tensor> run_forward(const char* function, const Tensor& q, const Tensor& k, const Tensor& v,
                                                        const OptionalTensor& lengths, const OptionalTensor& first_key,
                                                        bool causal, std::optional<double> scale, Keep keep) {
    const VisibilityViews seen(function, lengths, first_key, causal, scale);
    const TensorView vq = view(q, function, "q"), vk = view(k, function, "k"), vv = view(v, function, "v");
    const Problem p = attention::check(function, vq, vk, &vv, seen.options);
    Tensor out = output(q, p), lse = statistics(q, p);
    Tensor probs = keep == Keep::probs
                       ? empty(q, {p.batch, p.heads, attention::probs_elements(p.queries, p.keys, causal)}, q.scalar_type())
                       : empty(q, {0}, q.scalar_type());
    Backend::run(attention::Forward{p, vq, vk, vv, view(out, function, "out"), lse.mutable_data_ptr(),
                                    keep == Keep::probs ? probs.mutable_data_ptr() : nullptr},
                 q);
    return {out, lse, probs};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const Tensor& out, const Tensor& lse, const OptionalTensor& lengths,
                                                     const OptionalTensor& first_key, bool causal, std::optional<double> scale,
                                                     bool accumulate_kv, const OptionalTensor& dk_sum,
                                                     const OptionalTensor& dv_sum) {
    const char* f = "attention_bwd";
    const VisibilityViews seen(f, lengths, first_key, causal, scale);
    const TensorView vq = view(q, f, "q"), vk = view(k, f, "k"), vv = view(v, f, "v");
    const Problem p = attention::check(f, vq, vk, &vv, seen.options);
    const Tensor g = dense_last(dout);
    const TensorView vg = output_view(f, "dout", g, p);
    const ScalarType type = q.scalar_type(), kv_type = accumulate_kv ? accumulate_type(type) : type;
    Tensor dq = empty_heads(q, p.batch, p.heads, p.queries, p.head_dim, type);
    Tensor dk = empty_heads(k, p.batch, p.kv_heads, p.keys, p.head_dim, kv_type);
    Tensor dv = empty_heads(v, p.batch, p.kv_heads, p.keys, p.value_dim, kv_type);
    attention::Backward args{p, vq, vk, statistics_data(f, "lse", lse, p), nullptr, output_view(f, "out", out, p), 1, &vg, &vv};
    args.dq = view(dq, f, "dq"), args.dk = view(dk, f, "dk"), args.dv = view(dv, f, "dv");
    std::optional<Tensor> before_k, before_v;  // held until the kernels are on their way
    const auto sum = [&](const char* name, const OptionalTensor& given, std::optional<Tensor>& held, std::int64_t dim) {
      if (!given) return TensorView{};
      held = dense_last(*given);
      const TensorView v = view(*held, f, name);
      attention::check_tensor(f, name, v, p, statistics_type(p), {p.batch, p.kv_heads, p.keys, dim});
      return v;
    };
    args.dk_sum = sum("dk_sum", dk_sum, before_k, p.head_dim), args.dv_sum = sum("dv_sum", dv_sum, before_v, p.value_dim);
    Backend::run(args, q);
    return {dq, dk, dv};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> owner(
      const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& lengths, const OptionalTensor& first_key,
      bool causal, std::optional<double> scale, std::int64_t consumers, std::int64_t keep) {
    const char* f = "attention_with_scores";
    check(consumers >= 0, f, "consumers must not be negative, got ", consumers);
    check(keep == 0 || keep == 1, f, "keep must be 0 (lse) or 1 (probs), got ", keep);
    auto [out, lse, probs] = run_forward(f, q, k, v, lengths, first_key, causal, scale, static_cast<Keep>(keep));
    std::vector<Tensor> douts, values, uses;
    for (std::int64_t i = 0; i < consumers; ++i) {
      douts.push_back(slot(q, out.sizes(), q.scalar_type()));
      values.push_back(slot(q, v.sizes(), q.scalar_type()));
      uses.push_back(slot(q, {}, ScalarType::Float));
    }
    Tensor delta = slot(q, lse.sizes(), lse.scalar_type());
    return {out, lse, probs, delta, douts, values, uses};
  }

  static std::tuple<Tensor, Tensor, Tensor> owner_backward(const Tensor& q, const Tensor& k, const Tensor& out,
                                                           const Tensor& lse, const Tensor& probs, const OptionalTensor& delta,
                                                           const std::vector<Tensor>& douts, const std::vector<Tensor>& values,
                                                           const std::vector<Tensor>& uses, const OptionalTensor& lengths,
                                                           const OptionalTensor& first_key, bool causal,
                                                           std::optional<double> scale) {
    const char* f = "attention_with_scores_bwd";
    check(!values.empty() && douts.size() == values.size(), f, "got ", douts.size(), " output gradients for ", values.size(),
          " values");
    const VisibilityViews seen(f, lengths, first_key, causal, scale);
    const TensorView vq = view(q, f, "q"), vk = view(k, f, "k");
    std::vector<Tensor> g, vs;
    std::vector<TensorView> vg, vv;
    for (const Tensor& t : values) {
      vs.push_back(dense_last(t));
      vv.push_back(view(vs.back(), f, "values"));
    }
    const Problem p = attention::check(f, vq, vk, &vv[0], seen.options);
    for (const TensorView& t : vv)
      attention::check_tensor(f, "values", t, p, p.dtype, {p.batch, p.kv_heads, p.keys, p.value_dim});
    for (const Tensor& t : douts) {
      g.push_back(dense_last(t));
      vg.push_back(output_view(f, "douts", g.back(), p));
    }
    Tensor dq = empty_heads(q, p.batch, p.heads, p.queries, p.head_dim, q.scalar_type());
    Tensor dk = empty_heads(k, p.batch, p.kv_heads, p.keys, p.head_dim, q.scalar_type());
    Tensor dv = empty_heads(values[0], p.batch, p.kv_heads, p.keys, p.value_dim, q.scalar_type());
    attention::Backward args{p,
                             vq,
                             vk,
                             statistics_data(f, "lse", lse, p),
                             probs_data(f, probs, p),
                             output_view(f, "out", out, p),
                             static_cast<int>(values.size()),
                             vg.data(),
                             vv.data()};
    Tensor consumers_delta;
    if (delta) {
      consumers_delta = torch::stable::contiguous(*delta);
      args.consumers_delta = statistics_data(f, "delta", consumers_delta, p);
    }
    args.dq = view(dq, f, "dq"), args.dk = view(dk, f, "dk"), args.dv = view(dv, f, "dv");
    Backend::run(args, q);
    Backend::refuse_reused_scores(uses, dq, dk);
    return {dq, dk, dv};
  }

  static Tensor consumer(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, const Tensor& probs,
                         const Tensor& delta, const Tensor& dout_slot, const Tensor& value_slot, const Tensor& use,
                         const OptionalTensor& lengths, const OptionalTensor& first_key, bool causal,
                         std::optional<double> scale) {
    const char* f = "attention_from_scores";
    const VisibilityViews seen(f, lengths, first_key, causal, scale);
    const TensorView vq = view(q, f, "q"), vk = view(k, f, "k"), vv = view(v, f, "v");
    const Problem p = attention::check(f, vq, vk, &vv, seen.options);
    // The slots of the owner fix the shape of this layer's gradients: another value_dim would break the owner's backward.
    attention::check_tensor(f, "v", vv, p, p.dtype,
                            {value_slot.size(0), value_slot.size(1), value_slot.size(2), value_slot.size(3)});
    Tensor out = output(q, p);
    Backend::run(attention::SharedForward{p, vq, vk, vv, statistics_data(f, "lse", lse, p), probs_data(f, probs, p),
                                          view(out, f, "out")},
                 q);
    return out;
  }

  static std::tuple<Tensor, Tensor> consumer_backward(const Tensor& dout, const Tensor& out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& lse, const Tensor& probs,
                                                      const OptionalTensor& lengths, const OptionalTensor& first_key,
                                                      bool causal, std::optional<double> scale) {
    const char* f = "attention_from_scores_bwd";
    const VisibilityViews seen(f, lengths, first_key, causal, scale);
    const TensorView vq = view(q, f, "q"), vk = view(k, f, "k"), vv = view(v, f, "v");
    const Problem p = attention::check(f, vq, vk, &vv, seen.options);
    const Tensor g = dense_last(dout);
    Tensor dv = empty_heads(v, p.batch, p.kv_heads, p.keys, p.value_dim, q.scalar_type());
    Tensor delta = statistics(q, p);
    Backend::run(attention::SharedBackward{p, vq, vk, statistics_data(f, "lse", lse, p), probs_data(f, probs, p),
                                           output_view(f, "dout", g, p), output_view(f, "out", out, p), view(dv, f, "dv"),
                                           delta.mutable_data_ptr()},
                 q);
    return {dv, delta};
  }

  static std::tuple<Tensor, Tensor> share_kv(const Tensor& k, const Tensor& v) {
    const char* f = "share_kv";
    const TensorView vk = view(k, f, "k"), vv = view(v, f, "v");
    attention::check(f, vk, vk, &vv, {});  // k stands for the queries that are still to come
    return {slot(k, k.sizes(), k.scalar_type()), slot(k, v.sizes(), k.scalar_type())};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> shared_kv(const Tensor& q, const Tensor& k, const Tensor& v,
                                                              const Tensor& k_slot, const Tensor& v_slot,
                                                              const OptionalTensor& lengths, const OptionalTensor& first_key,
                                                              bool causal, std::optional<double> scale) {
    auto [out, lse, probs] = run_forward("attention_shared_kv", q, k, v, lengths, first_key, causal, scale, Keep::lse);
    const ScalarType sums = accumulate_type(k.scalar_type());
    return {out, lse, slot(k, k_slot.sizes(), sums), slot(k, v_slot.sizes(), sums)};
  }

  static std::tuple<Tensor, Tensor, Tensor> decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                                                   const OptionalTensor& first_key, std::optional<double> scale,
                                                   bool return_probs) {
    const char* f = "decode_attention";
    const VisibilityViews seen(f, lengths, first_key, false, scale);
    const TensorView vq = view(q, f, "q"), vk = view(k, f, "k"), vv = view(v, f, "v");
    const Problem p = attention::check(f, vq, vk, &vv, seen.options);
    check(p.queries == 1, f, "q must hold one token a row, got ", p.queries);
    Tensor out = output(q, p);
    Tensor weights = return_probs ? empty(q, {p.batch, p.heads, p.keys}, q.scalar_type()) : empty(q, {0}, q.scalar_type());
    Tensor scales = return_probs ? empty(q, {p.batch, p.heads, chunks(p)}, accumulate_type(q.scalar_type()))
                                 : empty(q, {0}, accumulate_type(q.scalar_type()));
    Backend::run(attention::Decode{p, vq, vk, vv, view(out, f, "out"), return_probs ? weights.mutable_data_ptr() : nullptr,
                                   return_probs ? scales.mutable_data_ptr() : nullptr},
                 q);
    return {out, weights, scales};
  }

  static std::int64_t chunks(const Problem& p) { return (p.keys + attention::decode_chunk - 1) / attention::decode_chunk; }

  static Tensor decode_from_probs(const Tensor& weights, const Tensor& scales, const Tensor& v, const Tensor& lengths,
                                  const OptionalTensor& first_key) {
    const char* f = "decode_from_probs";
    const TensorView vw = view(weights, f, "weights"), vv = view(v, f, "v");
    check(vw.rank == 3, f, "weights must be [batch, heads, keys], got ", vw.rank, " dimensions");
    const VisibilityViews seen(f, lengths, first_key, false, 1.0);
    // The shape of the queries that the weights came from; v stands in for k, of which only the shape is checked.
    TensorView q = vw;
    q.rank = 4, q.size[2] = 1, q.size[3] = vv.size[3], q.stride[2] = 0, q.stride[3] = 1;
    const Problem p = attention::check(f, q, vv, &vv, seen.options);
    attention::check_tensor(f, "weights", vw, p, p.dtype, {p.batch, p.heads, p.keys});
    attention::check_tensor(f, "scales", view(scales, f, "scales"), p, statistics_type(p), {p.batch, p.heads, chunks(p)});
    check(weights.is_contiguous() && scales.is_contiguous(), f, "weights and scales must be contiguous");
    Tensor out = empty(weights, {p.batch, p.heads, 1, p.value_dim}, weights.scalar_type());
    Backend::run(attention::DecodeFromProbs{p, weights.const_data_ptr(), scales.const_data_ptr(), vv, view(out, f, "out")},
                 weights);
    return out;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    EFFCORE_IMPL(m, "attention", forward);
    EFFCORE_IMPL(m, "attention_bwd", backward);
    EFFCORE_IMPL(m, "attention_with_scores", owner);
    EFFCORE_IMPL(m, "attention_with_scores_bwd", owner_backward);
    EFFCORE_IMPL(m, "attention_from_scores", consumer);
    EFFCORE_IMPL(m, "attention_from_scores_bwd", consumer_backward);
    EFFCORE_IMPL(m, "share_kv", share_kv);
    EFFCORE_IMPL(m, "attention_shared_kv", shared_kv);
    EFFCORE_IMPL(m, "decode_attention", decode);
    EFFCORE_IMPL(m, "decode_from_probs", decode_from_probs);
  }
};

}  // namespace effcore::binding
