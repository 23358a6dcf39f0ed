// The lowrank family's CUDA kernels under torch: the checks and allocations of lowrank.h, on torch's current stream.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "bindings/torch/launch.h"
#include "bindings/torch/lowrank.h"
#include "effcore/cuda/lowrank.h"

namespace effcore::binding {
namespace {

struct Cuda {
  template <class Args>
  static void call(void (*function)(const Args&, const cuda::Launch&), const Args& args, const Tensor& on) {
    call_on_stream(function, args, 0, on);
  }

  static constexpr auto mm_out = aoti_torch_cuda_mm_out;
  static constexpr auto addmm_out = aoti_torch_cuda_addmm_out;
  static std::span<const lowrank::Limits> limits(DType dtype) { return cuda::lowrank::limits(dtype); }
  static bool multiplies(ScalarType) { return true; }
  static bool takes(const lowrank::Linear& args) { return cuda::lowrank::takes(args); }
  static void run(const lowrank::Linear& args, const Tensor& on) { call(cuda::lowrank::linear, args, on); }
  static bool takes(const lowrank::InputGradient& args) { return cuda::lowrank::takes(args); }
  static void run(const lowrank::InputGradient& args, const Tensor& on) { call(cuda::lowrank::input_gradient, args, on); }
  static void run(const lowrank::Activate& args, const Tensor& on) { call(cuda::lowrank::activate, args, on); }
  static void run(const lowrank::ActivateBackward& args, const Tensor& on) { call(cuda::lowrank::activate_backward, args, on); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::LowrankOps<effcore::binding::Cuda>::implement(m);
}
