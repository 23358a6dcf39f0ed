// The routing family's CUDA kernels under torch: the checks and allocations of routing.h, on torch's current stream.
#include "bindings/torch/launch.h"
#include "bindings/torch/routing.h"
#include "effcore/cuda/routing.h"

namespace effcore::binding {
namespace {

struct Cuda {
  template <class Args>
  static void call(void (*function)(const Args&, const cuda::Launch&), const Args& args, const Tensor& on) {
    call_on_stream(function, args, cuda::routing::workspace_bytes(args), on);
  }

  static void run(const routing::Partition& args, const Tensor& on) { call(cuda::routing::partition, args, on); }
  static void run(const routing::ClassScores& args, const Tensor& on) { call(cuda::routing::class_scores, args, on); }
  static void run(const routing::ScorePartition& args, const Tensor& on) { call(cuda::routing::score_partition, args, on); }
  static void run(const routing::Gather& args, const Tensor& on) { call(cuda::routing::gather, args, on); }
  static void run(const routing::Merge& args, const Tensor& on) { call(cuda::routing::merge, args, on); }
  static void run(const routing::Scatter& args, const Tensor& on) { call(cuda::routing::scatter, args, on); }
  static void run(const routing::GatherNorm& args, const Tensor& on) { call(cuda::routing::gather_norm, args, on); }
  static void run(const routing::GatherNormBackward& args, const Tensor& on) {
    call(cuda::routing::gather_norm_backward, args, on);
  }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::RoutingOps<effcore::binding::Cuda>::implement(m);
}
