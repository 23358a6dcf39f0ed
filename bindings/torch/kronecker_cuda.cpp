// The kronecker family's CUDA kernels under torch: the checks and allocations of kronecker.h, on torch's current stream.
#include "bindings/torch/kronecker.h"
#include "bindings/torch/launch.h"
#include "effcore/cuda/kronecker.h"

namespace effcore::binding {
namespace {

struct Cuda {
  static void run(const kronecker::GroupedGram& args, const Tensor& on) {
    call_on_stream(cuda::kronecker::grouped_gram, args, cuda::kronecker::workspace_bytes(args), on);
  }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_IMPL(effcore, CUDA, m) {
  effcore::binding::KroneckerOps<effcore::binding::Cuda>::implement(m);
}
