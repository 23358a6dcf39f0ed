// The attention family's CUDA kernels under torch: the checks and allocations of attention.h, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch/attention.h"
#include "bindings/torch/launch.h"
#include "effcore/cuda/attention.h"

namespace effcore::binding {
namespace {

struct Cuda {
  template <class Args>
  static void call(void (*function)(const Args&, const cuda::Launch&), const Args& args, const Tensor& on) {
    call_on_stream(function, args, cuda::attention::workspace_bytes(args), on);
  }

  static void run(const attention::Forward& args, const Tensor& on) { call(cuda::attention::forward, args, on); }
  static void run(const attention::SharedForward& args, const Tensor& on) { call(cuda::attention::shared_forward, args, on); }
  static void run(const attention::SharedBackward& args, const Tensor& on) { call(cuda::attention::shared_backward, args, on); }
  static void run(const attention::Backward& args, const Tensor& on) { call(cuda::attention::backward, args, on); }
  static void run(const attention::Decode& args, const Tensor& on) { call(cuda::attention::decode, args, on); }
  static void run(const attention::DecodeFromProbs& args, const Tensor& on) {
    call(cuda::attention::decode_from_probs, args, on);
  }

  // Reading the counters would wait for the device: where one exceeds 1 the gradients become NaN instead.
  static void refuse_reused_scores(const std::vector<Tensor>& uses, const Tensor& dq, const Tensor& dk) {
    const char* f = "attention_with_scores_bwd";
    if (uses.empty()) return;
    std::vector<const float*> counts;
    for (const Tensor& use : uses) {
      check(use.scalar_type() == ScalarType::Float && use.is_cuda() && use.get_device_index() == dq.get_device_index() &&
                use.numel() == 1,
            f, "uses must be float32 scalars on the GPU of q");
      counts.push_back(use.const_data_ptr<float>());
    }
    const torch::stable::accelerator::DeviceGuard guard(dq.get_device_index());
    cuda::Launch launch;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(dq.get_device_index(), &launch.stream));
    for (const Tensor* gradient : {&dq, &dk})
      cuda::attention::spoil_if_reused(counts.data(), static_cast<int>(counts.size()), view(*gradient, f, "gradient"), launch);
  }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::AttentionOps<effcore::binding::Cuda>::implement(m);
}
