// The attention family on arrays in GPU memory.
#include "bindings/python/attention.h"
#include "bindings/python/backend_cuda.h"
#include "bindings/python/module.h"
#include "effcore/cuda/attention.h"

namespace effcore::python {
namespace {

namespace kernels = effcore::cuda::attention;

struct Cuda {
  template <class Args>
  static void run(const Context& context, const TensorView& q, const Args& args) {
    check_layers(context, args);
    run_on_cuda(
        context, "q", q, [&] { return kernels::workspace_bytes(args); },
        [&](const cuda::Launch& launch) { call(args, launch); });
  }

 private:
  template <class Args>
  static void check_layers(const Context&, const Args&) {}
  static void check_layers(const Context& context, const attention::Backward& args) {
    check(args.layers <= kernels::max_layers, context.function, "at most ", kernels::max_layers - 1,
          " consumers are supported on cuda, got ", args.layers - 1);
  }
  static void call(const attention::Forward& args, const cuda::Launch& launch) { kernels::forward(args, launch); }
  static void call(const attention::SharedForward& args, const cuda::Launch& launch) { kernels::shared_forward(args, launch); }
  static void call(const attention::SharedBackward& args, const cuda::Launch& launch) {
    kernels::shared_backward(args, launch);
  }
  static void call(const attention::Backward& args, const cuda::Launch& launch) { kernels::backward(args, launch); }
  static void call(const attention::Decode& args, const cuda::Launch& launch) { kernels::decode(args, launch); }
  static void call(const attention::DecodeFromProbs& args, const cuda::Launch& launch) {
    kernels::decode_from_probs(args, launch);
  }
};

}  // namespace

void define_attention(py::module_& m) {
  AttentionFunctions<Cuda>::define(m);
}

}  // namespace effcore::python
