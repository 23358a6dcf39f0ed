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

Tensor patch_embed3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* f = "patch_embed3d";
  // Through torch's dispatcher, which takes longer than the rest of this function: only where it does something.
  const auto contiguous = [](const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); };
  const Tensor kernel = contiguous(weight);
  // The kernel reads voxels 16 bytes at a time and the bias 4.
  const auto aligned = [](const Tensor& t, int bytes) {
    return reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % bytes == 0 ? t : torch::stable::clone(t);
  };
  const Tensor source = aligned(x, 16);
  std::optional<Tensor> added;
  cuda::conv3d::Patches args{view(source, f, "x"), view(kernel, f, "weight")};
  conv3d::check_patches(f, args.x, args.weight);
  TensorView vbias;
  if (bias) {
    added = aligned(contiguous(*bias), 4);
    vbias = view(*added, f, "bias");
    conv3d::check_bias(f, vbias, args.weight);
    args.bias = &vbias;
  }
  std::int64_t size[3];
  for (int d = 0; d < 3; ++d) size[d] = args.x.size[2 + d] / args.weight.size[2 + d];
  Tensor out = Conv3dOps<Cuda>::voxels(x, args.x.size[0], args.weight.size[0], size);
  args.out = view(out, f, "out");
  call_on_stream(cuda::conv3d::patches, args, 0, x);
  return out;
}

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::Conv3dOps<effcore::binding::Cuda>::implement(m);
  EFFCORE_IMPL(m, "patch_embed3d", effcore::binding::patch_embed3d);
}
