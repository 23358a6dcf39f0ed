// The routing family on arrays: check, allocate, call. One template serves NumPy and CuPy; a Backend runs a kernel
// (`static void run(const Context&, const char* argument, const TensorView& leader, const Args&)`).
#pragma once
#include <pybind11/stl.h>

#include <cmath>
#include <optional>

#include "bindings/python/dlpack.h"
#include "effcore/routing.h"

namespace effcore::python {

template <class Backend>
struct RoutingFunctions {
  using Scale = std::optional<double>;

  static py::str int32() { return "int32"; }
  static py::object statistics_dtype(const Array& like) {
    return py::str(name(like.view().dtype == DType::float64 ? DType::float64 : DType::float32));
  }
  // Rows of x's dtype.
  static Array rows(const Context& context, const Array& like, std::int64_t tokens) {
    return Array(context, {like.view().size[0], tokens, like.view().size[2]}, like.dtype());
  }
  static std::int32_t* indices(const Array& t) { return static_cast<std::int32_t*>(t.data()); }

  // -> (kept, rest)
  static py::tuple partition(py::object empty, std::int64_t stream, py::object scores_, std::int64_t keep,
                             std::int64_t protect) {
    const Context context{"array.partition_tokens", std::move(empty), stream};
    const Array scores(context, "scores", scores_);
    const TensorView& v = scores.view();
    routing::check_partition(context.function, v, keep, protect);
    const Array kept(context, {v.size[0], keep}, int32()), rest(context, {v.size[0], v.size[1] - keep}, int32());
    Backend::run(context, "scores", v, routing::Partition{v, keep, protect, indices(kept), indices(rest)});
    return py::make_tuple(kept.object(), rest.object());
  }

  static routing::ClassScores checked(const Context& context, const Array& q, const Array& k, Scale scale) {
    routing::ClassScores args{q.view(), k.view()};
    args.scale = scale.value_or(
        q.view().rank == 4 ? 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(q.view().size[3], 1))) : 1.0);
    routing::check_scores(context.function, args.q, args.k, args.scale);
    return args;
  }

  // -> scores
  static py::object class_scores(py::object empty, std::int64_t stream, py::object q_, py::object k_, Scale scale) {
    const Context context{"array.class_scores", std::move(empty), stream};
    const Array q(context, "q", q_), k(context, "k", k_);
    routing::ClassScores args = checked(context, q, k, scale);
    const Array scores(context, {args.k.size[0], args.k.size[2]}, statistics_dtype(q));
    args.scores = scores.data();
    Backend::run(context, "q", args.q, args);
    return scores.object();
  }

  // -> (kept, rest)
  static py::tuple score_partition(py::object empty, std::int64_t stream, py::object q_, py::object k_, std::int64_t keep,
                                   std::int64_t protect, Scale scale) {
    const Context context{"array.score_partition", std::move(empty), stream};
    const Array q(context, "q", q_), k(context, "k", k_);
    routing::ScorePartition args{checked(context, q, k, scale), {}};
    const std::int64_t batch = args.score.k.size[0], tokens = args.score.k.size[2];
    const Array scores(context, {batch, tokens}, statistics_dtype(q));
    args.score.scores = scores.data();
    routing::check_partition(context.function, scores.view(), keep, protect);
    const Array kept(context, {batch, keep}, int32()), rest(context, {batch, tokens - keep}, int32());
    args.partition = {scores.view(), keep, protect, indices(kept), indices(rest)};
    Backend::run(context, "q", args.score.q, args);
    return py::make_tuple(kept.object(), rest.object());
  }

  // -> x[b, index[b, i]]
  static py::object gather(py::object empty, std::int64_t stream, py::object x_, py::object index_) {
    const Context context{"array.gather_tokens", std::move(empty), stream};
    const Array x(context, "x", x_), index(context, "index", index_);
    routing::check_rows(context.function, "x", x.view(), nullptr);
    routing::check_list(context.function, "index", index.view(), x.view(), x.view().size[1]);
    const Array out = rows(context, x, index.view().size[1]);
    routing::Gather args{x.view()};
    args.list[0] = {out.view(), index.view()};
    Backend::run(context, "x", x.view(), args);
    return out.object();
  }

  // -> dx
  static py::object gather_backward(py::object empty, std::int64_t stream, py::object dout_, py::object index_,
                                    std::int64_t tokens) {
    const Context context{"array.gather_tokens_backward", std::move(empty), stream};
    const Array dout(context, "dout", dout_), index(context, "index", index_);
    routing::check_rows(context.function, "dout", dout.view(), nullptr);
    check(tokens >= 0, context.function, "tokens must not be negative, got ", tokens);
    routing::check_list(context.function, "index", index.view(), dout.view(), tokens);
    check_sizes(context.function, "dout", dout.view(), {dout.view().size[0], index.view().size[1], dout.view().size[2]});
    const Array dx = rows(context, dout, tokens);
    Backend::run(context, "dout", dout.view(), routing::Scatter{{dout.view(), index.view()}, dx.view()});
    return dx.object();
  }

  // -> (x at index_a, x at index_b)
  static py::tuple separate(py::object empty, std::int64_t stream, py::object x_, py::object index_a_, py::object index_b_) {
    const Context context{"array.separate_tokens", std::move(empty), stream};
    const Array x(context, "x", x_), index_a(context, "index_a", index_a_), index_b(context, "index_b", index_b_);
    routing::check_rows(context.function, "x", x.view(), nullptr);
    routing::check_lists(context.function, index_a.view(), index_b.view(), x.view(), x.view().size[1]);
    const Array a = rows(context, x, index_a.view().size[1]), b = rows(context, x, index_b.view().size[1]);
    routing::Gather args{x.view(), 2};
    args.list[0] = {a.view(), index_a.view()}, args.list[1] = {b.view(), index_b.view()};
    Backend::run(context, "x", x.view(), args);
    return py::make_tuple(a.object(), b.object());
  }

  // -> the rows in their original order, plus the residual
  static py::object merge(py::object empty, std::int64_t stream, py::object a_, py::object index_a_, py::object b_,
                          py::object index_b_, py::object residual_, py::object residual_a_) {
    const Context context{"array.merge_tokens", std::move(empty), stream};
    const char* f = context.function;
    const Array a(context, "a", a_), index_a(context, "index_a", index_a_), b(context, "b", b_),
        index_b(context, "index_b", index_b_);
    const TensorView &va = a.view(), &vb = b.view();
    routing::check_rows(f, "a", va, nullptr);
    routing::check_rows(f, "b", vb, &va);
    const std::int64_t batch = va.size[0], tokens = va.size[1] + vb.size[1], channels = va.size[2];
    check_sizes(f, "b", vb, {batch, vb.size[1], channels});
    routing::check_lists(f, index_a.view(), index_b.view(), va, tokens);
    check_sizes(f, "index_a", index_a.view(), {batch, va.size[1]});
    check_sizes(f, "index_b", index_b.view(), {batch, vb.size[1]});
    const Array out = rows(context, a, tokens);
    routing::Merge args;
    args.list[0] = {va, index_a.view()}, args.list[1] = {vb, index_b.view()};
    args.out = out.view();
    const auto residual = [&](std::optional<Array>& array, const char* argument, const py::object& given, std::int64_t size) {
      if (given.is_none()) return static_cast<const TensorView*>(nullptr);
      const TensorView& v = array.emplace(context, argument, given).view();
      routing::check_rows(f, argument, v, &va);
      check_sizes(f, argument, v, {batch, size, channels});
      return &v;
    };
    std::optional<Array> all, own;
    args.residual = residual(all, "residual", residual_, tokens);
    args.first_residual = residual(own, "residual_a", residual_a_, va.size[1]);
    Backend::run(context, "a", va, args);
    return out.object();
  }

  // -> (rows, their norm, mean or None, rstd)
  static py::tuple gather_norm(py::object empty, std::int64_t stream, py::object x_, py::object index_, py::object weight_,
                               py::object bias_, double eps, bool rms) {
    const Context context{rms ? "array.gather_rms_norm" : "array.gather_layer_norm", std::move(empty), stream};
    const char* f = context.function;
    const Array x(context, "x", x_), index(context, "index", index_), weight(context, "weight", weight_);
    routing::check_rows(f, "x", x.view(), nullptr);
    routing::check_list(f, "index", index.view(), x.view(), x.view().size[1]);
    routing::check_weight(f, "weight", weight.view(), x.view());
    check(eps >= 0 && std::isfinite(eps), f, "eps must be finite and not negative, got ", eps);
    const std::int64_t batch = x.view().size[0], size = index.view().size[1];
    const Array tokens = rows(context, x, size), normed = rows(context, x, size);
    const Array mean(context, {batch, rms ? 0 : size}, statistics_dtype(x)), rstd(context, {batch, size}, statistics_dtype(x));
    std::optional<Array> bias;
    routing::GatherNorm args{x.view(), {tokens.view(), index.view()}, normed.view(), weight.view()};
    if (!bias_.is_none()) {
      args.bias = &bias.emplace(context, "bias", bias_).view();
      routing::check_weight(f, "bias", *args.bias, x.view());
    }
    args.eps = eps, args.rms = rms;
    args.mean = rms ? nullptr : mean.data();
    args.rstd = rstd.data();
    Backend::run(context, "x", x.view(), args);
    return py::make_tuple(tokens.object(), normed.object(), rms ? py::none() : mean.object(), rstd.object());
  }

  // -> (dx, dweight, dbias), the last two in float32 (float64)
  static py::tuple gather_norm_backward(py::object empty, std::int64_t stream, py::object dnormed_, py::object dtokens_,
                                        py::object tokens_, py::object index_, py::object weight_, py::object mean_,
                                        py::object rstd_, std::int64_t total) {
    const Context context{"array.gather_norm_backward", std::move(empty), stream};
    const char* f = context.function;
    const Array dnormed(context, "dnormed", dnormed_), tokens(context, "tokens", tokens_), index(context, "index", index_),
        weight(context, "weight", weight_), rstd(context, "rstd", rstd_);
    const TensorView& v = tokens.view();
    routing::check_rows(f, "tokens", v, nullptr);
    check(total >= 0, f, "total must not be negative, got ", total);
    routing::check_list(f, "index", index.view(), v, total);
    const std::int64_t size = index.view().size[1];
    const auto check_like = [&](const char* argument, const TensorView& t) {
      routing::check_rows(f, argument, t, &v);
      check_sizes(f, argument, t, {v.size[0], size, v.size[2]});
    };
    check_like("tokens", v);
    check_like("dnormed", dnormed.view());
    routing::check_weight(f, "weight", weight.view(), v);
    routing::GatherNormBackward args{{v, index.view()}};
    args.dnormed = dnormed.view(), args.weight = weight.view();
    std::optional<Array> dtokens, mean;
    if (!dtokens_.is_none()) {
      args.dtokens = &dtokens.emplace(context, "dtokens", dtokens_).view();
      check_like("dtokens", *args.dtokens);
    }
    const auto statistics = [&](const char* argument, const Array& t) {
      check_sizes(f, argument, t.view(), {v.size[0], size});
      const DType wanted = v.dtype == DType::float64 ? DType::float64 : DType::float32;
      check(t.view().dtype == wanted && t.view().device == v.device && t.contiguous(), f, argument, " must be contiguous, ",
            name(wanted), " and where tokens are");
      return t.data();
    };
    args.rms = mean_.is_none();
    args.mean = args.rms ? nullptr : statistics("mean", mean.emplace(context, "mean", mean_));
    args.rstd = statistics("rstd", rstd);
    const Array dx = rows(context, tokens, total), dweight(context, {v.size[2]}, statistics_dtype(tokens)),
                dbias(context, {v.size[2]}, statistics_dtype(tokens));
    args.dx = dx.view(), args.dweight = dweight.data(), args.dbias = dbias.data();
    Backend::run(context, "tokens", v, args);
    return py::make_tuple(dx.object(), dweight.object(), dbias.object());
  }

  static void define(py::module_& m) {
    m.def("partition_tokens", partition);
    m.def("class_scores", class_scores);
    m.def("score_partition", score_partition);
    m.def("gather_tokens", gather);
    m.def("gather_tokens_backward", gather_backward);
    m.def("separate_tokens", separate);
    m.def("merge_tokens", merge);
    m.def("gather_norm", gather_norm);
    m.def("gather_norm_backward", gather_norm_backward);
  }
};

}  // namespace effcore::python
