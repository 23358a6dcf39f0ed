// The scan family's CUDA kernels under torch: the checks and allocations of scan.h, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch/scan.h"
#include "effcore/cuda/scan.h"

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
    if (const std::size_t bytes = cuda::scan::workspace_bytes(args)) {
      workspace = empty(on, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
      launch.workspace = workspace.mutable_data_ptr();
    }
    function(args, launch);
  }

  static void run(const scan::CausalConv& args, const Tensor& on) { call(cuda::scan::causal_conv, args, on); }
  static void run(const scan::CausalConvBackward& args, const Tensor& on) { call(cuda::scan::causal_conv_backward, args, on); }
  static void run(const scan::Scan& args, const Tensor& on) { call(cuda::scan::selective_scan, args, on); }
  static void run(const scan::ScanBackward& args, const Tensor& on) { call(cuda::scan::selective_scan_backward, args, on); }
  static void run(const scan::Step& args, const Tensor& on) { call(cuda::scan::selective_step, args, on); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::ScanOps<effcore::binding::Cuda>::implement(m);
}
