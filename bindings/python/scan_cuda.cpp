// The scan family on arrays in GPU memory.
#include "bindings/python/backend_cuda.h"
#include "bindings/python/module.h"
#include "bindings/python/scan.h"
#include "effcore/cuda/scan.h"

namespace effcore::python {
namespace {

namespace kernels = effcore::cuda::scan;

struct Cuda {
  template <class Args>
  static void run(const Context& context, const char* argument, const TensorView& leader, const Args& args) {
    run_on_cuda(
        context, argument, leader, [&] { return kernels::workspace_bytes(args); },
        [&](const cuda::Launch& launch) { call(args, launch); });
  }

 private:
  static void call(const scan::CausalConv& args, const cuda::Launch& launch) { kernels::causal_conv(args, launch); }
  static void call(const scan::CausalConvBackward& args, const cuda::Launch& launch) {
    kernels::causal_conv_backward(args, launch);
  }
  static void call(const scan::Scan& args, const cuda::Launch& launch) { kernels::selective_scan(args, launch); }
  static void call(const scan::ScanBackward& args, const cuda::Launch& launch) {
    kernels::selective_scan_backward(args, launch);
  }
  static void call(const scan::Step& args, const cuda::Launch& launch) { kernels::selective_step(args, launch); }
};

}  // namespace

void define_scan(py::module_& m) {
  ScanFunctions<Cuda>::define(m);
}

}  // namespace effcore::python
