// The attention family on arrays: check, allocate, call. One template serves NumPy and CuPy; a Backend runs a kernel
// (`static void run(const Context&, const TensorView& q, const Args&)`) and lets go of the GIL meanwhile.
#pragma once
#include <pybind11/stl.h>

#include <list>
#include <optional>
#include <vector>

#include "bindings/python/dlpack.h"
#include "effcore/attention.h"

namespace effcore::python {

// An optional argument: lengths, first_key, kept probabilities.
class OptionalArray {
 public:
  OptionalArray(const Context& context, const char* argument, const py::object& object) {
    if (!object.is_none()) array_.emplace(context, argument, object);
  }
  const TensorView* view() const { return array_ ? &array_->view() : nullptr; }
  const Array* get() const { return array_ ? &*array_ : nullptr; }

 private:
  std::optional<Array> array_;
};

// What every function of the family reads. `probs` is empty where only lse was kept.
struct Visibility {
  OptionalArray lengths, first_key;
  attention::Options options;

  Visibility(const Context& context, const py::object& lengths_, const py::object& first_key_, bool causal,
             std::optional<double> scale)
      : lengths(context, "lengths", lengths_), first_key(context, "first_key", first_key_) {
    options = {causal, scale, lengths.view(), first_key.view()};
  }
};

template <class Backend>
struct AttentionFunctions {
  using Problem = attention::Problem;
  using Scale = std::optional<double>;

  static DType statistics_type(const Problem& p) { return p.dtype == DType::float64 ? DType::float64 : DType::float32; }
  static py::object statistics_dtype(const Problem& p) { return py::str(name(statistics_type(p))); }
  static std::int64_t chunks(const Problem& p) { return (p.keys + attention::decode_chunk - 1) / attention::decode_chunk; }

  static const void* statistics_data(const Context& context, const char* argument, const Array& t, const Problem& p) {
    attention::check_tensor(context.function, argument, t.view(), p, statistics_type(p), {p.batch, p.heads, p.queries});
    check(t.contiguous(), context.function, argument, " must be contiguous");
    return t.data();
  }
  static const void* probs_data(const Context& context, const OptionalArray& probs, const Problem& p) {
    if (probs.get() == nullptr) return nullptr;
    attention::check_tensor(context.function, "probs", *probs.view(), p, p.dtype,
                            {p.batch, p.heads, attention::probs_elements(p.queries, p.keys, p.causal)});
    check(probs.get()->contiguous(), context.function, "probs must be contiguous");
    return probs.get()->data();
  }
  static TensorView output_view(const Context& context, const char* argument, const Array& t, const Problem& p) {
    attention::check_tensor(context.function, argument, t.view(), p, p.dtype, {p.batch, p.heads, p.queries, p.value_dim});
    return t.view();
  }
  // -> (out, lse, probs or None)
  static py::tuple forward(py::object empty, std::int64_t stream, py::object q_, py::object k_, py::object v_,
                           py::object lengths, py::object first_key, bool causal, Scale scale, bool keep_probs) {
    const Context context{"array.attention", std::move(empty), stream};
    const Array q(context, "q", q_), k(context, "k", k_), v(context, "v", v_);
    const Visibility seen(context, lengths, first_key, causal, scale);
    const Problem p = attention::check(context.function, q.view(), k.view(), &v.view(), seen.options);
    Array out(context, {p.batch, p.heads, p.queries, p.value_dim}, q.dtype(), q.token_major());
    Array lse(context, {p.batch, p.heads, p.queries}, statistics_dtype(p));
    std::optional<Array> probs;
    if (keep_probs) {
      const std::int64_t elements = attention::probs_elements(p.queries, p.keys, causal);
      probs.emplace(context, std::initializer_list<std::int64_t>{p.batch, p.heads, elements}, q.dtype());
    }
    Backend::run(context, q.view(),
                 attention::Forward{p, q.view(), k.view(), v.view(), out.view(), lse.data(), probs ? probs->data() : nullptr});
    return py::make_tuple(out.object(), lse.object(), probs ? probs->object() : py::none());
  }

  // -> out
  static py::object from_scores(py::object empty, std::int64_t stream, py::object q_, py::object k_, py::object v_,
                                py::object lse_, py::object probs_, py::object lengths, py::object first_key, bool causal,
                                Scale scale) {
    const Context context{"array.attention_from_scores", std::move(empty), stream};
    const Array q(context, "q", q_), k(context, "k", k_), v(context, "v", v_), lse(context, "lse", lse_);
    const OptionalArray probs(context, "probs", probs_);
    const Visibility seen(context, lengths, first_key, causal, scale);
    const Problem p = attention::check(context.function, q.view(), k.view(), &v.view(), seen.options);
    Array out(context, {p.batch, p.heads, p.queries, p.value_dim}, q.dtype(), q.token_major());
    Backend::run(context, q.view(),
                 attention::SharedForward{p, q.view(), k.view(), v.view(), statistics_data(context, "lse", lse, p),
                                          probs_data(context, probs, p), out.view()});
    return out.object();
  }

  // -> (dv, delta)
  static py::tuple from_scores_backward(py::object empty, std::int64_t stream, py::object dout_, py::object out_, py::object q_,
                                        py::object k_, py::object v_, py::object lse_, py::object probs_, py::object lengths,
                                        py::object first_key, bool causal, Scale scale) {
    const Context context{"array.attention_from_scores_backward", std::move(empty), stream};
    const Array q(context, "q", q_), k(context, "k", k_), v(context, "v", v_), lse(context, "lse", lse_);
    const Array dout(context, "dout", dout_), out(context, "out", out_);
    const OptionalArray probs(context, "probs", probs_);
    const Visibility seen(context, lengths, first_key, causal, scale);
    const Problem p = attention::check(context.function, q.view(), k.view(), &v.view(), seen.options);
    Array dv(context, {p.batch, p.kv_heads, p.keys, p.value_dim}, v.dtype(), v.token_major());
    Array delta(context, {p.batch, p.heads, p.queries}, statistics_dtype(p));
    Backend::run(context, q.view(),
                 attention::SharedBackward{p, q.view(), k.view(), statistics_data(context, "lse", lse, p),
                                           probs_data(context, probs, p), output_view(context, "dout", dout, p),
                                           output_view(context, "out", out, p), dv.view(), delta.data()});
    return py::make_tuple(dv.object(), delta.object());
  }

  // douts and values: the owner's first, then one of each consumer that was used -> (dq, dk, dv)
  static py::tuple backward(py::object empty, std::int64_t stream, const std::vector<py::object>& douts,
                            const std::vector<py::object>& values, py::object out_, py::object q_, py::object k_,
                            py::object lse_, py::object probs_, py::object delta_, py::object lengths, py::object first_key,
                            bool causal, Scale scale, bool float32_kv) {
    const Context context{"array.attention_backward", std::move(empty), stream};
    check(!values.empty() && douts.size() == values.size(), context.function, "got ", douts.size(), " output gradients for ",
          values.size(), " values");
    const Array q(context, "q", q_), k(context, "k", k_), lse(context, "lse", lse_), out(context, "out", out_);
    const OptionalArray probs(context, "probs", probs_), delta(context, "delta", delta_);
    std::list<Array> borrowed;  // an Array stays where it is
    std::vector<TensorView> value_views, dout_views;
    for (const py::object& v : values) value_views.push_back(borrowed.emplace_back(context, "v", v).view());
    const Array& v = borrowed.front();
    const Visibility seen(context, lengths, first_key, causal, scale);
    const Problem p = attention::check(context.function, q.view(), k.view(), &v.view(), seen.options);
    for (const TensorView& t : value_views)
      attention::check_tensor(context.function, "v", t, p, p.dtype, {p.batch, p.kv_heads, p.keys, p.value_dim});
    for (const py::object& g : douts)
      dout_views.push_back(output_view(context, "dout", borrowed.emplace_back(context, "dout", g), p));
    const py::object kv_dtype = float32_kv ? statistics_dtype(p) : q.dtype();
    Array dq(context, {p.batch, p.heads, p.queries, p.head_dim}, q.dtype(), q.token_major());
    Array dk(context, {p.batch, p.kv_heads, p.keys, p.head_dim}, kv_dtype, k.token_major());
    Array dv(context, {p.batch, p.kv_heads, p.keys, p.value_dim}, kv_dtype, v.token_major());
    attention::Backward args;
    args.problem = p;
    args.q = q.view(), args.k = k.view();
    args.lse = statistics_data(context, "lse", lse, p);
    args.probs = probs_data(context, probs, p);
    args.out = output_view(context, "out", out, p);
    args.layers = static_cast<int>(values.size());
    args.dout = dout_views.data();
    args.v = value_views.data();
    if (delta.get() != nullptr) args.consumers_delta = statistics_data(context, "delta", *delta.get(), p);
    args.dq = dq.view(), args.dk = dk.view(), args.dv = dv.view();
    Backend::run(context, q.view(), args);
    return py::make_tuple(dq.object(), dk.object(), dv.object());
  }

  // -> (out, weights or None, scales or None)
  static py::tuple decode(py::object empty, std::int64_t stream, py::object q_, py::object k_, py::object v_,
                          py::object lengths, py::object first_key, Scale scale, bool return_probs) {
    const Context context{"array.decode_attention", std::move(empty), stream};
    const Array q(context, "q", q_), k(context, "k", k_), v(context, "v", v_);
    const Visibility seen(context, lengths, first_key, false, scale);
    const Problem p = attention::check(context.function, q.view(), k.view(), &v.view(), seen.options);
    check(p.queries == 1, context.function, "q must hold one token a row, got ", p.queries);
    Array out(context, {p.batch, p.heads, p.queries, p.value_dim}, q.dtype(), q.token_major());
    std::optional<Array> weights, scales;
    if (return_probs) {
      weights.emplace(context, std::initializer_list<std::int64_t>{p.batch, p.heads, p.keys}, q.dtype());
      scales.emplace(context, std::initializer_list<std::int64_t>{p.batch, p.heads, chunks(p)}, statistics_dtype(p));
    }
    Backend::run(context, q.view(),
                 attention::Decode{p, q.view(), k.view(), v.view(), out.view(), weights ? weights->data() : nullptr,
                                   scales ? scales->data() : nullptr});
    return py::make_tuple(out.object(), weights ? weights->object() : py::none(), scales ? scales->object() : py::none());
  }

  // -> out
  static py::object decode_from_probs(py::object empty, std::int64_t stream, py::object weights_, py::object scales_,
                                      py::object v_, py::object lengths, py::object first_key) {
    const Context context{"array.decode_from_probs", std::move(empty), stream};
    const Array weights(context, "weights", weights_), scales(context, "scales", scales_), v(context, "v", v_);
    const TensorView& w = weights.view();
    check(w.rank == 3, context.function, "weights must be [batch, heads, keys], got ", w.rank, " dimensions");
    check(v.view().rank == 4, context.function, "v must be [batch, kv_heads, keys, value_dim], got ", v.view().rank,
          " dimensions");
    const Visibility seen(context, lengths, first_key, false, 1.0);
    // The shape of the queries that the weights came from; v stands in for k, of which only the shape is checked.
    TensorView q = w;
    q.rank = 4, q.size[2] = 1, q.size[3] = v.view().size[3], q.stride[2] = 0, q.stride[3] = 1;
    const Problem p = attention::check(context.function, q, v.view(), &v.view(), seen.options);
    attention::check_tensor(context.function, "weights", w, p, p.dtype, {p.batch, p.heads, p.keys});
    attention::check_tensor(context.function, "scales", scales.view(), p, statistics_type(p), {p.batch, p.heads, chunks(p)});
    check(weights.contiguous() && scales.contiguous(), context.function, "weights and scales must be contiguous");
    Array out(context, {p.batch, p.heads, 1, p.value_dim}, weights.dtype());
    Backend::run(context, weights.view(), attention::DecodeFromProbs{p, weights.data(), scales.data(), v.view(), out.view()});
    return out.object();
  }

  static void define(py::module_& m) {
    m.def("attention", forward);
    m.def("attention_from_scores", from_scores);
    m.def("attention_from_scores_backward", from_scores_backward);
    m.def("attention_backward", backward);
    m.def("decode_attention", decode);
    m.def("decode_from_probs", decode_from_probs);
  }
};

}  // namespace effcore::python
