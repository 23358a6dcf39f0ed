// The routing family on arrays in GPU memory.
#include "bindings/python/backend_cuda.h"
#include "bindings/python/module.h"
#include "bindings/python/routing.h"
#include "effcore/cuda/routing.h"

namespace effcore::python {
namespace {

namespace kernels = effcore::cuda::routing;

struct Cuda {
  template <class Args>
  static void run(const Context& context, const char* argument, const TensorView& leader, const Args& args) {
    run_on_cuda(
        context, argument, leader, [&] { return kernels::workspace_bytes(args); },
        [&](const cuda::Launch& launch) { call(args, launch); });
  }

 private:
  static void call(const routing::Partition& args, const cuda::Launch& launch) { kernels::partition(args, launch); }
  static void call(const routing::ClassScores& args, const cuda::Launch& launch) { kernels::class_scores(args, launch); }
  static void call(const routing::ScorePartition& args, const cuda::Launch& launch) { kernels::score_partition(args, launch); }
  static void call(const routing::Gather& args, const cuda::Launch& launch) { kernels::gather(args, launch); }
  static void call(const routing::Merge& args, const cuda::Launch& launch) { kernels::merge(args, launch); }
  static void call(const routing::Scatter& args, const cuda::Launch& launch) { kernels::scatter(args, launch); }
  static void call(const routing::GatherNorm& args, const cuda::Launch& launch) { kernels::gather_norm(args, launch); }
  static void call(const routing::GatherNormBackward& args, const cuda::Launch& launch) {
    kernels::gather_norm_backward(args, launch);
  }
};

}  // namespace

void define_routing(py::module_& m) {
  RoutingFunctions<Cuda>::define(m);
}

}  // namespace effcore::python
