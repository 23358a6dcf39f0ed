// The scan family on arrays: check, allocate, call. One template serves NumPy and CuPy; a Backend runs a kernel
// (`static void run(const Context&, const char* argument, const TensorView& leader, const Args&)`).
#pragma once
#include <optional>

#include "bindings/python/dlpack.h"
#include "effcore/routing.h"
#include "effcore/scan.h"

namespace effcore::python {

template <class Backend>
struct ScanFunctions {
  // An argument that may be None.
  class Optional {
   public:
    Optional(const Context& context, const char* argument, const py::object& object) {
      if (!object.is_none()) array_.emplace(context, argument, object);
    }
    const TensorView* get() const { return array_ ? &array_->view() : nullptr; }
    void* data() const { return array_ ? array_->data() : nullptr; }

   private:
    std::optional<Array> array_;
  };
  // A result that may not be wanted.
  class Result {
   public:
    Result(const Context& context, bool wanted, std::initializer_list<std::int64_t> sizes, const py::object& dtype) {
      if (wanted) array_.emplace(context, sizes, dtype);
    }
    TensorView* get() {
      if (array_) view_ = array_->view();
      return array_ ? &view_ : nullptr;
    }
    void* data() const { return array_ ? array_->data() : nullptr; }
    py::object object() const { return array_ ? array_->object() : py::none(); }

   private:
    std::optional<Array> array_;
    TensorView view_;
  };

  static py::object sums_dtype(const Array& like) {
    return py::str(name(like.view().dtype == DType::float64 ? DType::float64 : DType::float32));
  }
  static void check_rows_like(const char* function, const char* argument, const TensorView& rows, const TensorView& x) {
    routing::check_rows(function, argument, rows, &x);
    check_sizes(function, argument, rows, {x.size[0], x.size[1], x.size[2]});
  }

  // ---------------------------------------------------------------- convolution

  struct Conv {
    Context context;
    Array x, weight;
    Optional bias, initial_state, offsets;
    scan::CausalConv args;

    Conv(const char* function, py::object empty, std::int64_t stream, const py::object& x_, const py::object& weight_,
         const py::object& bias_, const py::object& initial, const py::object& offsets_, bool silu)
        : context{function, std::move(empty), stream},
          x(context, "x", x_),
          weight(context, "weight", weight_),
          bias(context, "bias", bias_),
          initial_state(context, "initial_state", initial),
          offsets(context, "offsets", offsets_) {
      args = {x.view(), weight.view(), bias.get(), initial_state.get(), offsets.get(), silu};
      scan::check_conv(function, args);
    }
  };

  // -> out
  static py::object conv(py::object empty, std::int64_t stream, py::object x, py::object weight, py::object bias,
                         py::object initial_state, py::object offsets, bool silu) {
    Conv c("array.causal_conv1d", empty, stream, x, weight, bias, initial_state, offsets, silu);
    const TensorView& v = c.args.x;
    const Array out(c.context, {v.size[0], v.size[1], v.size[2]}, c.x.dtype());
    c.args.out = out.view();
    Backend::run(c.context, "x", v, c.args);
    return out.object();
  }

  // -> (dx, dweight, dbias or None, dinitial_state or None)
  static py::tuple conv_backward(py::object empty, std::int64_t stream, py::object dout_, py::object x, py::object weight,
                                 py::object bias, py::object initial_state, py::object offsets, bool silu) {
    Conv c("array.causal_conv1d_backward", empty, stream, x, weight, bias, initial_state, offsets, silu);
    const TensorView &v = c.args.x, &w = c.args.weight;
    const Array dout(c.context, "dout", dout_);
    check_rows_like(c.context.function, "dout", dout.view(), v);
    const Array dx(c.context, {v.size[0], v.size[1], v.size[2]}, c.x.dtype());
    const Array dweight(c.context, {w.size[0], w.size[1]}, sums_dtype(c.x));
    const Result dbias(c.context, c.bias.get() != nullptr, {w.size[0]}, sums_dtype(c.x));
    Result dinitial(c.context, c.initial_state.get() != nullptr, {scan::sequences(v, c.args.offsets), w.size[1] - 1, v.size[2]},
                    c.x.dtype());
    const scan::CausalConvBackward args{c.args, dout.view(), dx.view(), dweight.data(), dbias.data(), dinitial.get()};
    Backend::run(c.context, "x", v, args);
    return py::make_tuple(dx.object(), dweight.object(), dbias.object(), dinitial.object());
  }

  // ---------------------------------------------------------------- scan

  struct Scan {
    Context context;
    Array x, dt, A, B, C;
    Optional D, z, dt_bias, initial_state, offsets;
    scan::Scan args;

    Scan(const char* function, py::object empty, std::int64_t stream, const py::object& x_, const py::object& dt_,
         const py::object& A_, const py::object& B_, const py::object& C_, const py::object& D_, const py::object& z_,
         const py::object& dt_bias_, const py::object& initial, const py::object& offsets_, bool softplus, std::int64_t keep)
        : context{function, std::move(empty), stream},
          x(context, "x", x_),
          dt(context, "dt", dt_),
          A(context, "A", A_),
          B(context, "B", B_),
          C(context, "C", C_),
          D(context, "D", D_),
          z(context, "z", z_),
          dt_bias(context, "dt_bias", dt_bias_),
          initial_state(context, "initial_state", initial),
          offsets(context, "offsets", offsets_) {
      args = {x.view(),      dt.view(),           A.view(),      B.view(), C.view(), D.get(), z.get(),
              dt_bias.get(), initial_state.get(), offsets.get(), softplus};
      scan::check_scan(function, args);
      check(keep >= 0 && keep <= scan::most_keep, function, "keep must be from 0 to 2^31, got ", keep);
      args.keep = keep;
    }
    std::int64_t sequences() const { return scan::sequences(args.x, args.offsets); }
    std::int64_t kept() const { return scan::kept_states(args.x, args.offsets, args.keep); }
  };

  // -> (out, final_state, states or None)
  static py::tuple selective_scan(py::object empty, std::int64_t stream, py::object x, py::object dt, py::object A,
                                  py::object B, py::object C, py::object D, py::object z, py::object dt_bias,
                                  py::object initial_state, py::object offsets, bool softplus, std::int64_t keep) {
    Scan s("array.selective_scan", empty, stream, x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, softplus, keep);
    const TensorView& v = s.args.x;
    const std::int64_t channels = v.size[2], n = s.args.A.size[1];
    const Array out(s.context, {v.size[0], v.size[1], channels}, s.x.dtype());
    const Array final_state(s.context, {s.sequences(), channels, n}, sums_dtype(s.x));
    const Result states(s.context, keep > 0, {keep > 0 ? s.kept() : 0, n, channels}, sums_dtype(s.x));
    s.args.out = out.view(), s.args.final_state = final_state.data(), s.args.states = states.data();
    Backend::run(s.context, "x", v, s.args);
    return py::make_tuple(out.object(), final_state.object(), states.object());
  }

  // -> (dx, ddt, dA, dB, dC, dD or None, dz or None, ddt_bias or None, dinitial_state or None)
  static py::tuple selective_scan_backward(py::object empty, std::int64_t stream, py::object dout_, py::object dfinal_,
                                           py::object x, py::object dt, py::object A, py::object B, py::object C, py::object D,
                                           py::object z, py::object dt_bias, py::object initial_state, py::object offsets,
                                           bool softplus, py::object states_, std::int64_t keep) {
    const char* f = "array.selective_scan_backward";
    Scan s(f, empty, stream, x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, softplus, keep);
    check(keep > 0, f, "keep must be at least 1, got ", keep);
    const TensorView& v = s.args.x;
    const std::int64_t batch = v.size[0], tokens = v.size[1], channels = v.size[2], n = s.args.A.size[1];
    const Array dout(s.context, "dout", dout_), states(s.context, "states", states_);
    const Optional dfinal(s.context, "dfinal_state", dfinal_);
    check_rows_like(f, "dout", dout.view(), v);
    scan::check_state(f, "states", states.view(), v, s.kept(), n, channels);
    if (dfinal.get() != nullptr) scan::check_state(f, "dfinal_state", *dfinal.get(), v, s.sequences(), channels, n);
    s.args.states = states.data();
    const py::object type = s.x.dtype(), wide = sums_dtype(s.x);
    const Array dx(s.context, {batch, tokens, channels}, type), ddt(s.context, {batch, tokens, channels}, type);
    const Array dB(s.context, {batch, tokens, n}, type), dC(s.context, {batch, tokens, n}, type);
    const Array dA(s.context, {channels, n}, wide);
    const Result dD(s.context, s.D.get() != nullptr, {channels}, wide);
    const Result ddt_bias(s.context, s.dt_bias.get() != nullptr, {channels}, wide);
    const Result dinitial(s.context, s.initial_state.get() != nullptr, {s.sequences(), channels, n}, wide);
    Result dz(s.context, s.z.get() != nullptr, {batch, tokens, channels}, type);
    scan::ScanBackward args{s.args, dout.view(), dfinal.data(), dx.view(), ddt.view(), dB.view(), dC.view(), dz.get()};
    args.dA = dA.data(), args.dD = dD.data(), args.ddt_bias = ddt_bias.data(), args.dinitial = dinitial.data();
    Backend::run(s.context, "x", v, args);
    return py::make_tuple(dx.object(), ddt.object(), dA.object(), dB.object(), dC.object(), dD.object(), dz.object(),
                          ddt_bias.object(), dinitial.object());
  }

  // -> (out, state)
  static py::tuple selective_step(py::object empty, std::int64_t stream, py::object state_, py::object x_, py::object dt_,
                                  py::object A_, py::object B_, py::object C_, py::object D_, py::object z_, py::object bias_,
                                  bool softplus) {
    const Context context{"array.selective_step", std::move(empty), stream};
    const Array state(context, "state", state_), x(context, "x", x_), dt(context, "dt", dt_), A(context, "A", A_),
        B(context, "B", B_), C(context, "C", C_);
    const Optional D(context, "D", D_), z(context, "z", z_), bias(context, "dt_bias", bias_);
    scan::Step args{state.view(), x.view(), dt.view(), A.view(), B.view(), C.view(), D.get(), z.get(), bias.get(), softplus};
    scan::check_step(context.function, args);
    const TensorView& v = state.view();
    const Array out(context, {v.size[0], v.size[1]}, x.dtype()),
        next(context, {v.size[0], v.size[1], v.size[2]}, state.dtype());
    args.out = out.view(), args.new_state = next.data();
    Backend::run(context, "x", args.x, args);
    return py::make_tuple(out.object(), next.object());
  }

  static void define(py::module_& m) {
    m.def("causal_conv1d", conv);
    m.def("causal_conv1d_backward", conv_backward);
    m.def("selective_scan", selective_scan);
    m.def("selective_scan_backward", selective_scan_backward);
    m.def("selective_step", selective_step);
  }
};

}  // namespace effcore::python
