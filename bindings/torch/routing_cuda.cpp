// The routing family's CUDA kernels under torch: the checks and allocations of routing.h, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch/routing.h"
#include "effcore/cuda/routing.h"

namespace effcore::binding {
namespace {

struct Cuda {
  // The workspace comes from torch's caching allocator, which hands it to others only behind this stream's work.
  template <class Args>
  static void call(void (*function)(const Args&, const cuda::Launch&), const Args& args, const Tensor& on) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    cuda::Launch launch;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &launch.stream));
    Tensor workspace;
    if (const std::size_t bytes = cuda::routing::workspace_bytes(args)) {
      workspace = empty(on, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
      launch.workspace = workspace.mutable_data_ptr();
    }
    function(args, launch);
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
