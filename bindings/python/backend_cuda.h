// How the array functions run a kernel on a GPU: CuPy's device, CuPy's current stream, CuPy's memory.
#pragma once
#include <cuda_runtime_api.h>

#include <optional>

#include "bindings/python/dlpack.h"
#include "effcore/cuda/launch.h"

namespace effcore::python {

inline void check_cuda(const char* function, cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(std::string("effcore.") + function + ": " + cudaGetErrorString(code));
}

// Makes a device current for as long as this lives.
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

// function(launch), with workspace_bytes() bytes of scratch memory; `leader` is the array that says where the call runs.
template <class Bytes, class Function>
void run_on_cuda(const Context& context, const char* argument, const TensorView& leader, const Bytes& workspace_bytes,
                 const Function& function) {
  check(leader.device == DeviceKind::cuda, context.function, argument, " is on ", name(leader.device),
        " but CuPy's arrays are on cuda");
  const DeviceGuard guard(context.function, leader.device_index);
  cuda::Launch launch;
  launch.stream = reinterpret_cast<void*>(context.stream);  // DLPack's 1 and 2 are CUDA's own names of the default streams
  // CuPy gives freed memory out again in the order of its stream, so the kernels may outlive this array.
  std::optional<Array> workspace;
  if (const std::size_t bytes = workspace_bytes(); bytes != 0) {
    workspace.emplace(context, std::initializer_list<std::int64_t>{static_cast<std::int64_t>(bytes)}, py::str("uint8"));
    launch.workspace = workspace->data();
  }
  const py::gil_scoped_release no_gil;
  function(launch);
}

}  // namespace effcore::python
