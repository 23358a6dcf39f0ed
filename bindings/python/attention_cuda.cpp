// The attention family on arrays in GPU memory: CuPy's device, CuPy's current stream, CuPy's memory.
#include <cuda_runtime_api.h>

#include "bindings/python/attention.h"
#include "bindings/python/module.h"
#include "effcore/cuda/attention.h"

namespace effcore::python {
namespace {

namespace kernels = effcore::cuda::attention;

void check_cuda(const char* function, cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(std::string("effcore.") + function + ": " + cudaGetErrorString(code));
}

// Makes the device current on which q lives, for as long as this lives.
class DeviceGuard {
 public:
  DeviceGuard(const char* function, int device) {
    check_cuda(function, cudaGetDevice(&before_));
    if (device != before_) check_cuda(function, cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

struct Cuda {
  template <class Args>
  static void run(const Context& context, const TensorView& q, const Args& args) {
    check(q.device == DeviceKind::cuda, context.function, "q is on ", name(q.device), " but CuPy's arrays are on cuda");
    check_layers(context, args);
    const DeviceGuard guard(context.function, q.device_index);
    cuda::Launch launch;
    launch.stream = reinterpret_cast<void*>(context.stream);  // DLPack's 1 and 2 are CUDA's own names of the default streams
    // CuPy gives freed memory out again in the order of its stream, so the kernels may outlive this array.
    std::optional<Array> workspace;
    if (const std::size_t bytes = kernels::workspace_bytes(args); bytes != 0) {
      workspace.emplace(context, std::initializer_list<std::int64_t>{static_cast<std::int64_t>(bytes)}, py::str("uint8"));
      launch.workspace = workspace->data();
    }
    const py::gil_scoped_release no_gil;
    call(args, launch);
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
