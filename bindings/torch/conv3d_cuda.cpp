// The conv3d family's CUDA kernels under torch: the checks and allocations of conv3d.h, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch/conv3d.h"
#include "effcore/cuda/conv3d.h"

namespace effcore::binding {
namespace {

struct Cuda {
  // The workspace comes from torch's caching allocator, which hands it to others only behind this stream's work.
  template <class Args>
  static void call(void (*function)(const Args&, const cuda::Launch&), const Args& args, const Tensor& on) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    cuda::Launch launch;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &launch.stream));
    Tensor workspace = empty(on, {static_cast<std::int64_t>(cuda::conv3d::workspace_bytes(args))}, ScalarType::Byte);
    launch.workspace = workspace.mutable_data_ptr();
    function(args, launch);
  }

  static void run(const conv3d::Forward& args, const Tensor& on) { call(cuda::conv3d::forward, args, on); }
  static void run(const conv3d::BackwardData& args, const Tensor& on) { call(cuda::conv3d::backward_data, args, on); }
  static void run(const conv3d::BackwardWeight& args, const Tensor& on) { call(cuda::conv3d::backward_weight, args, on); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::Conv3dOps<effcore::binding::Cuda>::implement(m);
}
