// The lowrank family's schemas and its CPU kernels under torch.
#include "bindings/torch/lowrank.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bindings/torch/threads.h"
#include "effcore/cpu.h"

namespace effcore::binding {
namespace {

struct Cpu {
  static constexpr auto mm_out = aoti_torch_cpu_mm_out;
  static constexpr auto addmm_out = aoti_torch_cpu_addmm_out;
  static std::span<const lowrank::Limits> limits(DType dtype) { return lowrank::limits(dtype); }
  static bool multiplies(ScalarType type) { return type != ScalarType::Half || multiplies_float16(); }
  static bool takes(const lowrank::Linear&) { return true; }
  static bool takes(const lowrank::InputGradient&) { return false; }
  static void run(const lowrank::InputGradient&, const Tensor&) {}
  static void run(const lowrank::Linear& args, const Tensor&) { lowrank::linear(args, threads()); }
  static void run(const lowrank::Activate& args, const Tensor&) { lowrank::activate(args, threads()); }
  static void run(const lowrank::ActivateBackward& args, const Tensor&) { lowrank::activate_backward(args, threads()); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_FRAGMENT(effcore, m) {
  m.def("lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias, int activation) -> Tensor out");
  m.def(
      "lowrank_linear_saving(Tensor x, Tensor down, Tensor up, Tensor? bias, int activation)"
      " -> (Tensor out, Tensor hidden, Tensor before)");
  m.def(
      "lowrank_linear_bwd(Tensor dout, Tensor x, Tensor down, Tensor up, Tensor hidden, Tensor before, int activation,"
      " bool want_x, bool want_down, bool want_up, bool want_bias)"
      " -> (Tensor dx, Tensor ddown, Tensor dup, Tensor dbias)");
  m.def("lowrank_limits(Tensor like) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(effcore, CPU, m) {
  effcore::binding::LowrankOps<effcore::binding::Cpu>::implement(m);
}
