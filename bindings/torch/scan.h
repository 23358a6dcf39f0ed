// The scan family as torch ops: check, allocate, call. One template serves the CPU and the CUDA library; a Backend says how to
// run a kernel (`static void run(const Args&, const Tensor& on)`).
#pragma once
#include <optional>
#include <tuple>

#include "bindings/torch/tensor.h"
#include "effcore/routing.h"
#include "effcore/scan.h"

namespace effcore::binding {

template <class Backend>
struct ScanOps {
  using OptionalTensor = std::optional<Tensor>;

  // An optional argument's view, for as long as the call lasts.
  struct OptionalView {
    OptionalView(const OptionalTensor& t, const char* function, const char* argument) : given(t.has_value()) {
      if (given) tensor = view(*t, function, argument);
    }
    OptionalView(const OptionalView&) = delete;
    const TensorView* get() const { return given ? &tensor : nullptr; }
    bool given;
    TensorView tensor;
  };

  // A gradient comes as autograd made it (an expanded scalar, a transposed view): rows must be contiguous.
  static Tensor dense_last(const Tensor& t) {
    return t.dim() == 3 && t.size(2) > 1 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t;
  }
  static Tensor none(const Tensor& device_of, ScalarType dtype) { return empty(device_of, {0}, dtype); }
  static void* data(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; }

  // ---------------------------------------------------------------- convolution

  struct Conv {
    OptionalView bias, initial_state, offsets;
    scan::CausalConv args;
    Conv(const char* f, const Tensor& x, const Tensor& weight, const OptionalTensor& bias_, const OptionalTensor& initial,
         const OptionalTensor& offsets_, bool silu)
        : bias(bias_, f, "bias"), initial_state(initial, f, "initial_state"), offsets(offsets_, f, "offsets") {
      args = {view(x, f, "x"), view(weight, f, "weight"), bias.get(), initial_state.get(), offsets.get(), silu};
      scan::check_conv(f, args);
    }
  };

  static Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
                     const OptionalTensor& offsets, bool silu) {
    const char* f = "causal_conv1d";
    Conv c(f, x, weight, bias, initial_state, offsets, silu);
    Tensor out = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
    c.args.out = view(out, f, "out");
    Backend::run(c.args, x);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                                  const OptionalTensor& bias,
                                                                  const OptionalTensor& initial_state,
                                                                  const OptionalTensor& offsets, bool silu) {
    const char* f = "causal_conv1d_bwd";
    Conv c(f, x, weight, bias, initial_state, offsets, silu);
    const Tensor g = dense_last(dout);
    scan::CausalConvBackward args{c.args, view(g, f, "dout")};
    routing::check_rows(f, "dout", args.dout, &c.args.x);
    check_sizes(f, "dout", args.dout, {x.size(0), x.size(1), x.size(2)});
    const ScalarType sums = accumulate_type(x.scalar_type());
    Tensor dx = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
    Tensor dweight = empty(x, {weight.size(0), weight.size(1)}, sums);
    Tensor dbias = bias ? empty(x, {weight.size(0)}, sums) : none(x, sums);
    Tensor dinitial = initial_state
                          ? empty(x, {initial_state->size(0), initial_state->size(1), initial_state->size(2)}, x.scalar_type())
                          : none(x, x.scalar_type());
    args.dx = view(dx, f, "dx");
    args.dweight = dweight.mutable_data_ptr();
    args.dbias = data(dbias, bias.has_value());
    TensorView vinitial = view(dinitial, f, "dinitial");
    args.dinitial = initial_state ? &vinitial : nullptr;
    Backend::run(args, x);
    return {dx, dweight, dbias, dinitial};
  }

  // ---------------------------------------------------------------- scan

  struct ScanArguments {
    OptionalView D, z, dt_bias, initial_state, offsets;
    scan::Scan args;
    ScanArguments(const char* f, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                  const OptionalTensor& D_, const OptionalTensor& z_, const OptionalTensor& dt_bias_,
                  const OptionalTensor& initial, const OptionalTensor& offsets_, bool softplus, std::int64_t keep)
        : D(D_, f, "D"),
          z(z_, f, "z"),
          dt_bias(dt_bias_, f, "dt_bias"),
          initial_state(initial, f, "initial_state"),
          offsets(offsets_, f, "offsets") {
      args = {view(x, f, "x"), view(dt, f, "dt"), view(A, f, "A"),     view(B, f, "B"), view(C, f, "C"), D.get(),
              z.get(),         dt_bias.get(),     initial_state.get(), offsets.get(),   softplus};
      scan::check_scan(f, args);
      check(keep >= 0 && keep <= scan::most_keep, f, "keep must be from 0 to 2^31, got ", keep);
      args.keep = keep;
    }
    std::int64_t sequences() const { return scan::sequences(args.x, args.offsets); }
    std::int64_t kept() const { return args.keep > 0 ? scan::kept_states(args.x, args.offsets, args.keep) : 0; }
  };

  static std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                                           const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                                           const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
                                                           const OptionalTensor& offsets, bool softplus, std::int64_t keep) {
    const char* f = "selective_scan";
    ScanArguments s(f, x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, softplus, keep);
    const ScalarType wide = accumulate_type(x.scalar_type());
    Tensor out = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
    Tensor final_state = empty(x, {s.sequences(), A.size(0), A.size(1)}, wide);
    Tensor states = empty(x, {s.kept(), A.size(1), A.size(0)}, wide);
    s.args.out = view(out, f, "out");
    s.args.final_state = final_state.mutable_data_ptr();
    s.args.states = data(states, keep > 0);
    Backend::run(s.args, x);
    return {out, final_state, states};
  }

  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  static Gradients selective_scan_backward(const Tensor& dout, const OptionalTensor& dfinal, const Tensor& x, const Tensor& dt,
                                           const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                           const OptionalTensor& z, const OptionalTensor& dt_bias,
                                           const OptionalTensor& offsets, const Tensor& states, bool softplus,
                                           std::int64_t keep, bool has_initial) {
    const char* f = "selective_scan_bwd";
    ScanArguments s(f, x, dt, A, B, C, D, z, dt_bias, std::nullopt, offsets, softplus, keep);
    check(keep > 0, f, "keep must be at least 1, got ", keep);
    const Tensor g = dense_last(dout);
    const std::int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), n = A.size(1);
    const TensorView vstates = view(states, f, "states");
    scan::check_state(f, "states", vstates, s.args.x, s.kept(), n, channels);
    s.args.states = vstates.data;
    scan::ScanBackward args{s.args, view(g, f, "dout")};
    routing::check_rows(f, "dout", args.dout, &s.args.x);
    check_sizes(f, "dout", args.dout, {batch, tokens, channels});
    Tensor final_gradient;
    if (dfinal) {
      final_gradient = torch::stable::contiguous(*dfinal);
      scan::check_state(f, "dfinal", view(final_gradient, f, "dfinal"), s.args.x, s.sequences(), channels, n);
      args.dfinal = final_gradient.const_data_ptr();
    }
    const ScalarType type = x.scalar_type(), wide = accumulate_type(type);
    const auto rows = [&](std::int64_t columns) { return empty(x, {batch, tokens, columns}, type); };
    Tensor dx = rows(channels), ddt = rows(channels), dB = rows(n), dC = rows(n);
    Tensor dz = z ? rows(channels) : none(x, type);
    Tensor dA = empty(x, {channels, n}, wide), dD = D ? empty(x, {channels}, wide) : none(x, wide);
    Tensor ddt_bias = dt_bias ? empty(x, {channels}, wide) : none(x, wide);
    Tensor dinitial = has_initial ? empty(x, {s.sequences(), channels, n}, wide) : none(x, wide);
    args.dx = view(dx, f, "dx"), args.ddt = view(ddt, f, "ddt"), args.dB = view(dB, f, "dB"), args.dC = view(dC, f, "dC");
    TensorView vz = view(dz, f, "dz");
    args.dz = z ? &vz : nullptr;
    args.dA = dA.mutable_data_ptr(), args.dD = data(dD, D.has_value());
    args.ddt_bias = data(ddt_bias, dt_bias.has_value()), args.dinitial = data(dinitial, has_initial);
    Backend::run(args, x);
    return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial};
  }

  static std::tuple<Tensor, Tensor> selective_step(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A,
                                                   const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                   const OptionalTensor& z, const OptionalTensor& dt_bias, bool softplus) {
    const char* f = "selective_step";
    const OptionalView vD(D, f, "D"), vz(z, f, "z"), vbias(dt_bias, f, "dt_bias");
    scan::Step args{view(state, f, "state"), view(x, f, "x"), view(dt, f, "dt"), view(A, f, "A"), view(B, f, "B"),
                    view(C, f, "C"),         vD.get(),        vz.get(),          vbias.get(),     softplus};
    scan::check_step(f, args);
    Tensor out = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    Tensor next = empty(x, {state.size(0), state.size(1), state.size(2)}, state.scalar_type());
    args.out = view(out, f, "out");
    args.new_state = next.mutable_data_ptr();
    Backend::run(args, x);
    return {out, next};
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    EFFCORE_IMPL(m, "causal_conv1d", conv);
    EFFCORE_IMPL(m, "causal_conv1d_bwd", conv_backward);
    EFFCORE_IMPL(m, "selective_scan", selective_scan);
    EFFCORE_IMPL(m, "selective_scan_bwd", selective_scan_backward);
    EFFCORE_IMPL(m, "selective_step", selective_step);
  }
};

}  // namespace effcore::binding
