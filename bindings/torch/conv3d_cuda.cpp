// The conv3d family's CUDA kernels under torch: the checks and allocations of conv3d.h, on torch's current stream.
#include "bindings/torch/conv3d.h"
#include "bindings/torch/launch.h"
#include "effcore/cuda/conv3d.h"

namespace effcore::binding {
namespace {

struct Cuda {
  template <class Args>
  static void call(void (*function)(const Args&, const cuda::Launch&), const Args& args, const Tensor& on) {
    call_on_stream(function, args, cuda::conv3d::workspace_bytes(args), on);
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
