// CUDA functions on torch's current stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch/tensor.h"
#include "effcore/cuda/launch.h"

namespace effcore::binding {

// The workspace comes from torch's caching allocator, which hands it to others only behind this stream's work.
template <class Args>
void call_on_stream(void (*function)(const Args&, const cuda::Launch&), const Args& args, std::size_t workspace_bytes,
                    const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  cuda::Launch launch;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &launch.stream));
  Tensor workspace;
  if (workspace_bytes > 0) {
    workspace = empty(on, {static_cast<std::int64_t>(workspace_bytes)}, ScalarType::Byte);
    launch.workspace = workspace.mutable_data_ptr();
  }
  function(args, launch);
}

}  // namespace effcore::binding
