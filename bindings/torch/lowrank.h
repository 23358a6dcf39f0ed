// The lowrank family as torch ops: check, choose, allocate, call. One template serves the CPU and the CUDA library; a Backend
// says where its fused kernel is the fastest way (`limits`, `takes`) and how to run a kernel (`run`). The products beyond it
// are torch's.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <optional>
#include <tuple>

#include "bindings/torch/tensor.h"
#include "effcore/lowrank.h"

namespace effcore::binding {

template <class Backend>
struct LowrankOps {
  using OptionalTensor = std::optional<Tensor>;
  using lowrank_activation = lowrank::Activation;

  static Tensor as_matrix(const Tensor& t) {
    return t.dim() != 2 || t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
  }
  // [..., n] as [rows, n] without a copy where strides allow it.
  static Tensor as_rows(const Tensor& t, const char* f, const char* argument) {
    check(t.dim() >= 1, f, argument, " must have at least 1 dimension, got a scalar");
    if (t.dim() == 2) return as_matrix(t);
    const std::int64_t n = t.size(t.dim() - 1);
    std::int64_t rows = 1;
    for (std::int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
    return as_matrix(torch::stable::reshape(t, std::array<std::int64_t, 2>{rows, n}));
  }
  static Tensor reinterpret(const Tensor& t, const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides) {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                          strides.data(), 0, &handle));
    return Tensor(handle);
  }
  static Tensor transposed(const Tensor& t) { return reinterpret(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }
  // A contiguous [rows, n] in the leading dimensions of `like`: the same memory, not a view of it.
  static Tensor as_shape(const Tensor& rows, const Tensor& like, std::int64_t n) {
    if (like.dim() == 2) return rows;
    std::vector<std::int64_t> sizes(like.sizes().begin(), like.sizes().end()), strides(sizes.size());
    sizes.back() = n;
    std::int64_t step = 1;
    for (std::size_t i = sizes.size(); i-- > 0; step *= std::max<std::int64_t>(sizes[i], 1)) strides[i] = step;
    return reinterpret(rows, sizes, strides);
  }

  // a b (+ bias), by torch's library: the C entry points of its kernels, which cost a third of a dispatcher call by name.
  // In float32 where that library has no kernel for a's dtype but for dot products: of one row of a and b's columns, if each
  // lies in one piece.
  static Tensor product(const Tensor& a, const Tensor& b, const OptionalTensor& bias = std::nullopt) {
    const bool dots = a.size(0) == 1 && b.stride(0) == 1;
    if (!dots && !Backend::multiplies(a.scalar_type())) {
      const auto wide = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
      const Tensor out = product(wide(a), wide(b), bias ? OptionalTensor(wide(*bias)) : std::nullopt);
      return torch::stable::to(out, a.scalar_type());
    }
    Tensor out = empty(a, {a.size(0), b.size(1)}, a.scalar_type());
    const AOTITorchError code = bias ? Backend::addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0)
                                     : Backend::mm_out(out.get(), a.get(), b.get());
    TORCH_ERROR_CODE_CHECK(code);
    return out;
  }

  struct Result {
    Tensor out, hidden, before;
  };

  static Result compute(const char* f, const Tensor& x, const Tensor& down_, const Tensor& up_, const OptionalTensor& bias,
                        std::int64_t activation, bool save) {
    const Tensor rows = as_rows(x, f, "x"), down = as_matrix(down_), up = as_matrix(up_);
    lowrank::Linear args{view(rows, f, "x"), view(down, f, "down"), view(up, f, "up")};
    TensorView vbias;
    if (bias) args.bias = &(vbias = view(*bias, f, "bias"));
    lowrank::check_linear(f, args.x, args.down, args.up, args.bias, activation);
    args.activation = static_cast<lowrank_activation>(activation);
    const std::int64_t n = args.x.size[0], rank = args.down.size[0], out_features = args.up.size[0];
    const ScalarType type = x.scalar_type();
    const bool save_before = save && args.activation > lowrank_activation::relu;
    Result r;
    if (lowrank::within(Backend::limits(args.x.dtype), args.x.dtype, n, args.x.size[1], rank, out_features) &&
        Backend::takes(args)) {
      r.out = empty(x, {n, out_features}, type);
      args.out = view(r.out, f, "out");
      if (save) args.hidden = (r.hidden = empty(x, {n, rank}, type)).mutable_data_ptr();
      if (save_before) args.before = (r.before = empty(x, {n, out_features}, type)).mutable_data_ptr();
      Backend::run(args, x);
    } else {
      r.hidden = product(rows, transposed(down));
      r.out = product(r.hidden, transposed(up), bias);
      if (args.activation != lowrank_activation::none) {
        if (save_before) {
          r.before = r.out;
          r.out = empty(x, {n, out_features}, type);
        }
        const Tensor& in = save_before ? r.before : r.out;
        Backend::run(lowrank::Activate{view(in, f, "out"), view(r.out, f, "out"), args.activation}, x);
      }
    }
    if (save && !save_before) r.before = empty(x, {0}, type);
    r.out = as_shape(r.out, x, out_features);
    return r;
  }

  static Tensor forward(const Tensor& x, const Tensor& down, const Tensor& up, const OptionalTensor& bias,
                        std::int64_t activation) {
    return compute("lowrank_linear", x, down, up, bias, activation, false).out;
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_and_save(const Tensor& x, const Tensor& down, const Tensor& up,
                                                             const OptionalTensor& bias, std::int64_t activation) {
    Result r = compute("lowrank_linear", x, down, up, bias, activation, true);
    return {r.out, r.hidden, r.before};
  }

  // With dz = dout f'(before):  dup = dzᵀ hidden,  dbias = Σ dz,  dhidden = dz up,  ddown = dhiddenᵀ x,  dx = dhidden down.
  // `before` is the activation's argument, or its result for relu, or empty. Gradients that are not wanted are empty.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& x, const Tensor& down_,
                                                             const Tensor& up_, const Tensor& hidden, const Tensor& before,
                                                             std::int64_t activation, bool want_x, bool want_down, bool want_up,
                                                             bool want_bias) {
    const char* f = "lowrank_linear_bwd";
    const Tensor rows = as_rows(x, f, "x"), down = as_matrix(down_), up = as_matrix(up_);
    const TensorView vx = view(rows, f, "x"), vdown = view(down, f, "down"), vup = view(up, f, "up");
    lowrank::check_linear(f, vx, vdown, vup, nullptr, activation);
    Tensor dz = as_rows(dout, f, "dout");
    const TensorView vdout = view(dz, f, "dout"), vhidden = view(hidden, f, "hidden");
    lowrank::check_like(f, "dout", vdout, vx, vx.size[0], vup.size[0]);
    lowrank::check_like(f, "hidden", vhidden, vx, vx.size[0], vdown.size[0]);
    if (const auto kind = static_cast<lowrank_activation>(activation); kind != lowrank_activation::none) {
      const Tensor argument = as_rows(before, f, "before");
      const TensorView vbefore = view(argument, f, "before");
      lowrank::check_like(f, "before", vbefore, vx, vx.size[0], vup.size[0]);
      const Tensor fresh = empty(x, {vx.size[0], vup.size[0]}, x.scalar_type());
      Backend::run(lowrank::ActivateBackward{vdout, vbefore, view(fresh, f, "dz"), kind}, x);
      dz = fresh;
    }
    Tensor dx, ddown, dup, dbias;
    if (want_up) dup = product(transposed(dz), hidden);
    if (want_bias) dbias = torch::stable::sum(dz, std::array<std::int64_t, 1>{0});
    if (want_x || want_down) {
      Tensor dhidden;
      lowrank::InputGradient args{view(dz, f, "dz"), vdown, vup, {}, nullptr};
      if (want_x && Backend::takes(args)) {
        dx = empty(x, {vx.size[0], vx.size[1]}, x.scalar_type());
        args.dx = view(dx, f, "dx");
        if (want_down) args.dhidden = (dhidden = empty(x, {vx.size[0], vdown.size[0]}, x.scalar_type())).mutable_data_ptr();
        Backend::run(args, x);
      } else {
        dhidden = product(dz, up);
        if (want_x) dx = product(dhidden, down);
      }
      if (want_x) dx = as_shape(dx, x, vx.size[1]);
      if (want_down) ddown = product(transposed(dhidden), rows);
    }
    for (Tensor* t : {&dx, &ddown, &dup, &dbias})
      if (!t->defined()) *t = empty(x, {0}, x.scalar_type());
    return {dx, ddown, dup, dbias};
  }

  // Of each box, in the order of Limits, for the dtype of `like`.
  static std::vector<std::int64_t> limits(const Tensor& like) {
    std::vector<std::int64_t> all;
    for (const lowrank::Limits& b : Backend::limits(dtype_of(like.scalar_type())))
      for (const std::int64_t x : {b.least_rows, b.most_rows, b.least_bytes, b.least_rank, b.most_rank, b.least_in, b.most_in,
                                   b.least_out, b.most_out})
        all.push_back(x);
    return all;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    EFFCORE_IMPL(m, "lowrank_linear", forward);
    EFFCORE_IMPL(m, "lowrank_linear_saving", forward_and_save);
    EFFCORE_IMPL(m, "lowrank_linear_bwd", backward);
    EFFCORE_IMPL(m, "lowrank_limits", limits);
  }
};

}  // namespace effcore::binding
