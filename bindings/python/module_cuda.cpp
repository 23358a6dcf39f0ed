// effcore._cuda: the kernels of the GPU on arrays. Built where CUDA is; it links the CUDA runtime and no torch.
#include <cuda_runtime_api.h>

#include "bindings/python/module.h"
#include "effcore/cuda/attention.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["architectures"] = EFFCORE_ARCHITECTURES;
  info["toolkit"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["dtypes"] = py::make_tuple("float32", "bfloat16", "float16");
  return info;
}

// Which kernels of the attention family serve this on the current GPU, or why none does.
std::string attention_path(const std::string& dtype, std::int64_t head_dim, std::int64_t value_dim) {
  effcore::attention::Problem problem;
  problem.dtype = dtype == "float32"    ? effcore::DType::float32
                  : dtype == "bfloat16" ? effcore::DType::bfloat16
                  : dtype == "float16"  ? effcore::DType::float16
                                        : effcore::DType::other;
  problem.head_dim = head_dim, problem.value_dim = value_dim;
  return effcore::cuda::attention::path(problem);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "effcore's kernels on arrays in GPU memory; use effcore.array";
  m.def("build_info", build_info);
  m.def("attention_path", attention_path, py::arg("dtype"), py::arg("head_dim"), py::arg("value_dim"));
  effcore::python::define_attention(m);
  effcore::python::define_routing(m);
  effcore::python::define_scan(m);
}
