// effcore._cuda: the kernels of the GPU on arrays. Built where CUDA is; it links the CUDA runtime and no torch.
#include <cuda_runtime_api.h>

#include "bindings/python/module.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["architectures"] = EFFCORE_ARCHITECTURES;
  info["toolkit"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["dtypes"] = py::make_tuple("float32", "bfloat16", "float16");
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "effcore's kernels on arrays in GPU memory; use effcore.array";
  m.def("build_info", build_info);
  effcore::python::define_attention(m);
}
