// The scan family's CUDA kernels under torch: the checks and allocations of scan.h, on torch's current stream.
#include "bindings/torch/launch.h"
#include "bindings/torch/scan.h"
#include "effcore/cuda/scan.h"

namespace effcore::binding {
namespace {

struct Cuda {
  template <class Args>
  static void call(void (*function)(const Args&, const cuda::Launch&), const Args& args, const Tensor& on) {
    call_on_stream(function, args, cuda::scan::workspace_bytes(args), on);
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
