// The kronecker family as torch ops: check, allocate, call. One template serves the CPU and the CUDA library; a Backend says how
// to run a kernel (`static void run(const Args&, const Tensor& on)`).
#pragma once
#include <optional>

#include "bindings/torch/tensor.h"
#include "effcore/kronecker.h"

namespace effcore::binding {

template <class Backend>
struct KroneckerOps {
  // Writes into `out` where it is given, and then returns an empty tensor: a result may not be an alias of an argument.
  static Tensor grouped_gram(const Tensor& x, const Tensor& offsets, double alpha, double beta, std::optional<Tensor> out) {
    const char* f = "grouped_gram";
    kronecker::GroupedGram args{view(x, f, "x"), view(offsets, f, "offsets"), alpha, beta};
    kronecker::check_tokens(f, args.x, args.offsets);
    check(out.has_value() || beta == 0.0, f, "beta is ", beta, " but there is no out for it to scale");
    const ScalarType dtype = accumulate_type(x.scalar_type());
    const std::int64_t experts = args.offsets.size[0] - 1, dim = args.x.size[1];
    Tensor fresh = out ? empty(x, {0}, dtype) : empty(x, {experts, dim, dim}, dtype);
    if (out) kronecker::check_gram(f, view(*out, f, "out"), args.x, args.offsets);
    args.result = out ? out->mutable_data_ptr() : fresh.mutable_data_ptr();
    args.previous = beta != 0.0 ? args.result : nullptr;
    Backend::run(args, x);
    return fresh;
  }

  static void implement(torch::stable::detail::StableLibrary& m) { EFFCORE_IMPL(m, "grouped_gram", grouped_gram); }
};

}  // namespace effcore::binding
