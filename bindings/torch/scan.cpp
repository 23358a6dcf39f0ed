// The scan family's schemas and its CPU kernels under torch.
#include "bindings/torch/scan.h"

#include "bindings/torch/threads.h"

namespace effcore::binding {
namespace {

struct Cpu {
  static void run(const scan::CausalConv& args, const Tensor&) { scan::causal_conv(args, threads()); }
  static void run(const scan::CausalConvBackward& args, const Tensor&) { scan::causal_conv_backward(args, threads()); }
  static void run(const scan::Scan& args, const Tensor&) { scan::selective_scan(args, threads()); }
  static void run(const scan::ScanBackward& args, const Tensor&) { scan::selective_scan_backward(args, threads()); }
  static void run(const scan::Step& args, const Tensor&) { scan::selective_step(args, threads()); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_FRAGMENT(effcore, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? offsets, bool silu)"
      " -> Tensor out");
  m.def(
      "causal_conv1d_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? offsets,"
      " bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial)");
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
      " Tensor? initial_state, Tensor? offsets, bool dt_softplus, SymInt keep)"
      " -> (Tensor out, Tensor final_state, Tensor states)");
  m.def(
      "selective_scan_bwd(Tensor dout, Tensor? dfinal, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
      " Tensor? z, Tensor? dt_bias, Tensor? offsets, Tensor states, bool dt_softplus, SymInt keep, bool has_initial)"
      " -> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddt_bias,"
      " Tensor dinitial)");
  m.def(
      "selective_step(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
      " Tensor? dt_bias, bool dt_softplus) -> (Tensor out, Tensor new_state)");
}

STABLE_TORCH_LIBRARY_IMPL(effcore, CPU, m) {
  effcore::binding::ScanOps<effcore::binding::Cpu>::implement(m);
}
