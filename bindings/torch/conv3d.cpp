// The conv3d family's schemas and its CPU kernels under torch.
#include "bindings/torch/conv3d.h"

#include "bindings/torch/threads.h"

namespace effcore::binding {
namespace {

struct Cpu {
  static void run(const conv3d::Forward& args, const Tensor&) { conv3d::forward(args, threads()); }
  static void run(const conv3d::BackwardData& args, const Tensor&) { conv3d::backward_data(args, threads()); }
  static void run(const conv3d::BackwardWeight& args, const Tensor&) { conv3d::backward_weight(args, threads()); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_FRAGMENT(effcore, m) {
  m.def(
      "cross_conv3d(Tensor x, Tensor spatial, Tensor temporal, Tensor? bias, int[] stride, int[] padding)"
      " -> Tensor out");
  m.def(
      "cross_conv3d_bwd_data(Tensor dout, Tensor spatial, Tensor temporal, int[] stride, int[] padding,"
      " SymInt frames, SymInt height, SymInt width) -> Tensor dx");
  m.def(
      "cross_conv3d_bwd_weight(Tensor x, Tensor dout, int[] kernel, int[] stride, int[] padding, bool channels_inside=False)"
      " -> (Tensor dspatial, Tensor dtemporal)");
  m.def("patch_embed3d(Tensor x, Tensor weight, Tensor? bias) -> Tensor out");
}

STABLE_TORCH_LIBRARY_IMPL(effcore, CPU, m) {
  effcore::binding::Conv3dOps<effcore::binding::Cpu>::implement(m);
}
