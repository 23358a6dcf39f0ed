// The kronecker family's CUDA kernels under torch: the checks and allocations of kronecker.h, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch/kronecker.h"
#include "effcore/cuda/kronecker.h"

namespace effcore::binding {
namespace {

struct Cuda {
  static void run(const kronecker::GroupedGram& args, const Tensor& on) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    cuda::Launch launch;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &launch.stream));
    Tensor workspace;
    if (const std::size_t bytes = cuda::kronecker::workspace_bytes(args)) {
      workspace = empty(on, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
      launch.workspace = workspace.mutable_data_ptr();
    }
    cuda::kronecker::grouped_gram(args, launch);
  }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::KroneckerOps<effcore::binding::Cuda>::implement(m);
}
