// effcore._cuda: the kernels of the GPU on arrays. Built where CUDA is; it links the CUDA runtime and no torch.
#include <cuda_runtime_api.h>

#include <map>
#include <stdexcept>
#include <string>

#include "bindings/python/module.h"
#include "effcore/cuda/attention.h"
#include "effcore/cuda/conv3d.h"
#include "effcore/cuda/kronecker.h"
#include "effcore/cuda/lowrank.h"
#include "effcore/cuda/routing.h"
#include "effcore/cuda/scan.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["architectures"] = EFFCORE_ARCHITECTURES;
  info["toolkit"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["dtypes"] = py::make_tuple("float32", "bfloat16", "float16");
  return info;
}

// Which kernels of a family serve a dtype on the current GPU, or why none does: each family answers for itself.
std::string path(const std::string& family, const std::string& dtype) {
  namespace cuda = effcore::cuda;
  using effcore::DType;
  static const std::map<std::string, const char* (*)(DType)> families{
      {"attention", cuda::attention::path}, {"conv3d", cuda::conv3d::path},   {"kronecker", cuda::kronecker::path},
      {"lowrank", cuda::lowrank::path},     {"routing", cuda::routing::path}, {"scan", cuda::scan::path}};
  static const std::map<std::string, DType> dtypes{
      {"float32", DType::float32}, {"bfloat16", DType::bfloat16}, {"float16", DType::float16}, {"float64", DType::float64}};
  const auto found = families.find(family);
  if (found == families.end()) throw std::invalid_argument("effcore._cuda.path: no family is called " + family);
  const auto type = dtypes.find(dtype);
  return found->second(type != dtypes.end() ? type->second : DType::other);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "effcore's kernels on arrays in GPU memory; use effcore.array";
  m.def("build_info", build_info);
  m.def("path", path, py::arg("family"), py::arg("dtype"));
  effcore::python::define_attention(m);
  effcore::python::define_routing(m);
  effcore::python::define_scan(m);
}
