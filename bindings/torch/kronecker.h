// The kronecker family as torch ops: check, allocate, call. One template serves the CPU and the CUDA library; a Backend says
// how to run a kernel (`static void run(const Args&, const Tensor& on)`).
#pragma once
#include "bindings/torch/tensor.h"
#include "effcore/kronecker.h"

namespace effcore::binding {

template <class Backend>
struct KroneckerOps {
  static Tensor grouped_gram(const Tensor& x, const Tensor& offsets, double alpha) {
    const char* f = "grouped_gram";
    kronecker::GroupedGram args{view(x, f, "x"), view(offsets, f, "offsets"), alpha};
    kronecker::check_tokens(f, args.x, args.offsets);
    const std::int64_t experts = args.offsets.size[0] - 1, dim = args.x.size[1];
    Tensor gram = empty(x, {experts, dim, dim}, accumulate_type(x.scalar_type()));
    args.result = gram.mutable_data_ptr();
    Backend::run(args, x);
    return gram;
  }

  static void grouped_gram_(Tensor out, const Tensor& x, const Tensor& offsets, double alpha, double beta) {
    const char* f = "grouped_gram";
    kronecker::GroupedGram args{view(x, f, "x"), view(offsets, f, "offsets"), alpha, beta};
    kronecker::check_tokens(f, args.x, args.offsets);
    kronecker::check_gram(f, view(out, f, "out"), args.x, args.offsets);
    args.result = out.mutable_data_ptr();
    args.previous = beta != 0.0 ? args.result : nullptr;
    Backend::run(args, x);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    EFFCORE_IMPL(m, "grouped_gram", grouped_gram);
    EFFCORE_IMPL(m, "grouped_gram_", grouped_gram_);
  }
};

}  // namespace effcore::binding
