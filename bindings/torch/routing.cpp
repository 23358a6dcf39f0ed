// The routing family's schemas and its CPU kernels under torch.
#include "bindings/torch/routing.h"

#include "bindings/torch/threads.h"

namespace effcore::binding {
namespace {

struct Cpu {
  static void run(const routing::Partition& args, const Tensor&) { routing::partition(args, threads()); }
  static void run(const routing::ClassScores& args, const Tensor&) { routing::class_scores(args, threads()); }
  static void run(const routing::ScorePartition& args, const Tensor&) { routing::score_partition(args, threads()); }
  static void run(const routing::Gather& args, const Tensor&) { routing::gather(args, threads()); }
  static void run(const routing::Merge& args, const Tensor&) { routing::merge(args, threads()); }
  static void run(const routing::Scatter& args, const Tensor&) { routing::scatter(args, threads()); }
  static void run(const routing::GatherNorm& args, const Tensor&) { routing::gather_norm(args, threads()); }
  static void run(const routing::GatherNormBackward& args, const Tensor&) { routing::gather_norm_backward(args, threads()); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_FRAGMENT(effcore, m) {
  m.def("partition_tokens(Tensor scores, SymInt keep, SymInt protect) -> (Tensor kept, Tensor rest)");
  m.def("class_scores(Tensor q, Tensor k, float? scale) -> Tensor scores");
  m.def("score_partition(Tensor q, Tensor k, SymInt keep, SymInt protect, float? scale) -> (Tensor kept, Tensor rest)");
  m.def("gather_tokens(Tensor x, Tensor index) -> Tensor out");
  m.def("gather_tokens_bwd(Tensor dout, Tensor index, SymInt tokens) -> Tensor dx");
  m.def("separate_tokens(Tensor x, Tensor index_a, Tensor index_b) -> (Tensor a, Tensor b)");
  m.def(
      "merge_tokens(Tensor a, Tensor index_a, Tensor b, Tensor index_b, Tensor? residual, Tensor? residual_a)"
      " -> Tensor out");
  m.def(
      "gather_norm(Tensor x, Tensor index, Tensor weight, Tensor? bias, float eps, bool rms)"
      " -> (Tensor tokens, Tensor normed, Tensor mean, Tensor rstd)");
  m.def(
      "gather_norm_bwd(Tensor? dtokens, Tensor dnormed, Tensor tokens, Tensor index, Tensor weight, Tensor mean,"
      " Tensor rstd, SymInt total, bool rms, bool has_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(effcore, CPU, m) {
  effcore::binding::RoutingOps<effcore::binding::Cpu>::implement(m);
}
