// The routing family as torch ops: check, allocate, call. One template serves the CPU and the CUDA library; a Backend says how
// to run a kernel (`static void run(const Args&, const Tensor& on)`).
#pragma once
#include <cmath>
#include <optional>
#include <tuple>

#include "bindings/torch/tensor.h"
#include "effcore/routing.h"

namespace effcore::binding {

template <class Backend>
struct RoutingOps {
  using OptionalTensor = std::optional<Tensor>;

  // A gradient comes as autograd made it (an expanded scalar, a transposed view): rows must be contiguous.
  static Tensor dense_last(const Tensor& t) {
    return t.dim() == 3 && t.size(2) > 1 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t;
  }
  static Tensor like(const Tensor& rows, std::int64_t tokens) {
    return empty(rows, {rows.size(0), tokens, rows.size(2)}, rows.scalar_type());
  }
  static std::int32_t* indices(Tensor& t) { return static_cast<std::int32_t*>(t.mutable_data_ptr()); }

  static std::tuple<Tensor, Tensor> partition(const Tensor& scores, std::int64_t keep, std::int64_t protect) {
    const char* f = "partition_tokens";
    const TensorView vs = view(scores, f, "scores");
    routing::check_partition(f, vs, keep, protect);
    Tensor kept = empty(scores, {vs.size[0], keep}, ScalarType::Int),
           rest = empty(scores, {vs.size[0], vs.size[1] - keep}, ScalarType::Int);
    Backend::run(routing::Partition{vs, keep, protect, indices(kept), indices(rest)}, scores);
    return {kept, rest};
  }

  static routing::ClassScores checked_scores(const char* f, const Tensor& q, const Tensor& k, std::optional<double> scale,
                                             Tensor& scores) {
    routing::ClassScores args{view(q, f, "q"), view(k, f, "k")};
    args.scale = scale.value_or(
        args.q.rank == 4 ? 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(args.q.size[3], 1))) : 1.0);
    routing::check_scores(f, args.q, args.k, args.scale);
    scores = empty(q, {args.k.size[0], args.k.size[2]}, accumulate_type(q.scalar_type()));
    args.scores = scores.mutable_data_ptr();
    return args;
  }

  static Tensor class_scores(const Tensor& q, const Tensor& k, std::optional<double> scale) {
    Tensor scores;
    Backend::run(checked_scores("class_scores", q, k, scale, scores), q);
    return scores;
  }

  static std::tuple<Tensor, Tensor> score_partition(const Tensor& q, const Tensor& k, std::int64_t keep, std::int64_t protect,
                                                    std::optional<double> scale) {
    const char* f = "score_partition";
    Tensor scores;
    routing::ScorePartition args{checked_scores(f, q, k, scale, scores), {view(scores, f, "scores"), keep, protect}};
    routing::check_partition(f, args.partition.scores, keep, protect);
    const std::int64_t batch = args.score.k.size[0], tokens = args.score.k.size[2];
    Tensor kept = empty(q, {batch, keep}, ScalarType::Int), rest = empty(q, {batch, tokens - keep}, ScalarType::Int);
    args.partition.kept = indices(kept), args.partition.rest = indices(rest);
    Backend::run(args, q);
    return {kept, rest};
  }

  static Tensor gather(const Tensor& x, const Tensor& index) {
    const char* f = "gather_tokens";
    const TensorView vx = view(x, f, "x"), vi = view(index, f, "index");
    routing::check_rows(f, "x", vx, nullptr);
    routing::check_list(f, "index", vi, vx, vx.size[1]);
    Tensor out = like(x, vi.size[1]);
    routing::Gather args{vx};
    args.list[0] = {view(out, f, "out"), vi};
    Backend::run(args, x);
    return out;
  }

  static Tensor gather_backward(const Tensor& dout, const Tensor& index, std::int64_t tokens) {
    const char* f = "gather_tokens_bwd";
    const Tensor g = dense_last(dout);
    const TensorView vg = view(g, f, "dout"), vi = view(index, f, "index");
    routing::check_rows(f, "dout", vg, nullptr);
    check(tokens >= 0, f, "tokens must not be negative, got ", tokens);
    routing::check_list(f, "index", vi, vg, tokens);
    check_sizes(f, "dout", vg, {vg.size[0], vi.size[1], vg.size[2]});
    Tensor dx = like(g, tokens);
    Backend::run(routing::Scatter{{vg, vi}, view(dx, f, "dx")}, dout);
    return dx;
  }

  static std::tuple<Tensor, Tensor> separate(const Tensor& x, const Tensor& index_a, const Tensor& index_b) {
    const char* f = "separate_tokens";
    const Tensor source = dense_last(x);
    const TensorView vx = view(source, f, "x"), va = view(index_a, f, "index_a"), vb = view(index_b, f, "index_b");
    routing::check_rows(f, "x", vx, nullptr);
    routing::check_lists(f, va, vb, vx, vx.size[1]);
    Tensor a = like(x, va.size[1]), b = like(x, vb.size[1]);
    routing::Gather args{vx, 2};
    args.list[0] = {view(a, f, "a"), va}, args.list[1] = {view(b, f, "b"), vb};
    Backend::run(args, x);
    return {a, b};
  }

  static Tensor merge(const Tensor& a, const Tensor& index_a, const Tensor& b, const Tensor& index_b,
                      const OptionalTensor& residual, const OptionalTensor& residual_a) {
    const char* f = "merge_tokens";
    const Tensor a_ = dense_last(a), b_ = dense_last(b);
    const TensorView va = view(a_, f, "a"), vb = view(b_, f, "b");
    const TensorView ia = view(index_a, f, "index_a"), ib = view(index_b, f, "index_b");
    routing::check_rows(f, "a", va, nullptr);
    routing::check_rows(f, "b", vb, &va);
    const std::int64_t batch = va.size[0], tokens = va.size[1] + vb.size[1], channels = va.size[2];
    check_sizes(f, "b", vb, {batch, vb.size[1], channels});
    routing::check_lists(f, ia, ib, va, tokens);
    check_sizes(f, "index_a", ia, {batch, va.size[1]});
    check_sizes(f, "index_b", ib, {batch, vb.size[1]});
    Tensor out = like(a, tokens);
    routing::Merge args;
    args.list[0] = {va, ia}, args.list[1] = {vb, ib};
    args.out = view(out, f, "out");
    Tensor all, own;
    TensorView vall, vown;
    if (residual) {
      vall = view(all = dense_last(*residual), f, "residual");
      routing::check_rows(f, "residual", vall, &va);
      check_sizes(f, "residual", vall, {batch, tokens, channels});
      args.residual = &vall;
    }
    if (residual_a) {
      vown = view(own = dense_last(*residual_a), f, "residual_a");
      routing::check_rows(f, "residual_a", vown, &va);
      check_sizes(f, "residual_a", vown, {batch, va.size[1], channels});
      args.first_residual = &vown;
    }
    Backend::run(args, a);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> gather_norm(const Tensor& x, const Tensor& index, const Tensor& weight,
                                                                const OptionalTensor& bias, double eps, bool rms) {
    const char* f = rms ? "gather_rms_norm" : "gather_layer_norm";
    const TensorView vx = view(x, f, "x"), vi = view(index, f, "index");
    routing::check_rows(f, "x", vx, nullptr);
    routing::check_list(f, "index", vi, vx, vx.size[1]);
    routing::GatherNorm args{vx};
    args.weight = view(weight, f, "weight");
    routing::check_weight(f, "weight", args.weight, vx);
    TensorView vbias;
    if (bias) {
      vbias = view(*bias, f, "bias");
      routing::check_weight(f, "bias", vbias, vx);
      args.bias = &vbias;
    }
    check(eps >= 0 && std::isfinite(eps), f, "eps must be finite and not negative, got ", eps);
    const ScalarType statistics = accumulate_type(x.scalar_type());
    Tensor tokens = like(x, vi.size[1]), normed = like(x, vi.size[1]);
    Tensor mean = rms ? empty(x, {0}, statistics) : empty(x, {vi.size[0], vi.size[1]}, statistics);
    Tensor rstd = empty(x, {vi.size[0], vi.size[1]}, statistics);
    args.tokens = {view(tokens, f, "tokens"), vi};
    args.normed = view(normed, f, "normed");
    args.eps = eps, args.rms = rms;
    args.mean = rms ? nullptr : mean.mutable_data_ptr();
    args.rstd = rstd.mutable_data_ptr();
    Backend::run(args, x);
    return {tokens, normed, mean, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> gather_norm_backward(const OptionalTensor& dtokens, const Tensor& dnormed,
                                                                 const Tensor& tokens, const Tensor& index,
                                                                 const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                                 std::int64_t total, bool rms, bool has_bias) {
    const char* f = "gather_norm_bwd";
    const Tensor g = dense_last(dnormed);
    const TensorView vt = view(tokens, f, "tokens"), vi = view(index, f, "index");
    routing::check_rows(f, "tokens", vt, nullptr);
    check(total >= 0, f, "total must not be negative, got ", total);
    routing::check_list(f, "index", vi, vt, total);
    const auto rows = {vt.size[0], vi.size[1], vt.size[2]};
    check_sizes(f, "tokens", vt, rows);
    routing::GatherNormBackward args{{vt, vi}};
    args.dnormed = view(g, f, "dnormed");
    routing::check_rows(f, "dnormed", args.dnormed, &vt);
    check_sizes(f, "dnormed", args.dnormed, rows);
    args.weight = view(weight, f, "weight");
    routing::check_weight(f, "weight", args.weight, vt);
    Tensor direct;
    TensorView vdirect;
    if (dtokens) {
      vdirect = view(direct = dense_last(*dtokens), f, "dtokens");
      routing::check_rows(f, "dtokens", vdirect, &vt);
      check_sizes(f, "dtokens", vdirect, rows);
      args.dtokens = &vdirect;
    }
    const ScalarType statistics = accumulate_type(tokens.scalar_type());
    args.rms = rms;
    args.mean = rms ? nullptr : statistics_data(f, "mean", mean, tokens, vi);
    args.rstd = statistics_data(f, "rstd", rstd, tokens, vi);
    Tensor dx = like(tokens, total), dweight = empty(tokens, {vt.size[2]}, statistics);
    Tensor dbias = empty(tokens, {has_bias ? vt.size[2] : 0}, statistics);
    args.dx = view(dx, f, "dx");
    args.dweight = dweight.mutable_data_ptr();
    args.dbias = has_bias ? dbias.mutable_data_ptr() : nullptr;
    Backend::run(args, tokens);
    return {dx, dweight, dbias};
  }

  // A contiguous [B, size] tensor of statistics on the device of `tokens`, checked.
  static const void* statistics_data(const char* f, const char* argument, const Tensor& t, const Tensor& tokens,
                                     const TensorView& index) {
    const TensorView v = view(t, f, argument), vt = view(tokens, f, "tokens");
    check_sizes(f, argument, v, {index.size[0], index.size[1]});
    check(t.scalar_type() == accumulate_type(tokens.scalar_type()), f, argument, " is ", name(v.dtype), " but must be ",
          name(dtype_of(accumulate_type(tokens.scalar_type()))));
    check(v.device == vt.device && v.device_index == vt.device_index && t.is_contiguous(), f, argument,
          " must be contiguous and on the device of tokens");
    return t.const_data_ptr();
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    EFFCORE_IMPL(m, "partition_tokens", partition);
    EFFCORE_IMPL(m, "class_scores", class_scores);
    EFFCORE_IMPL(m, "score_partition", score_partition);
    EFFCORE_IMPL(m, "gather_tokens", gather);
    EFFCORE_IMPL(m, "gather_tokens_bwd", gather_backward);
    EFFCORE_IMPL(m, "separate_tokens", separate);
    EFFCORE_IMPL(m, "merge_tokens", merge);
    EFFCORE_IMPL(m, "gather_norm", gather_norm);
    EFFCORE_IMPL(m, "gather_norm_bwd", gather_norm_backward);
  }
};

}  // namespace effcore::binding
