// effcore._core: the kernels of the CPU on arrays, and what was built. It imports neither torch nor NumPy.
#include "bindings/python/module.h"

#include "bindings/python/threads.h"
#include "effcore/cpu.h"

namespace py = pybind11;
namespace python = effcore::python;

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc " __VERSION__;
#else
constexpr const char* compiler = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = EFFCORE_VERSION;
  info["compiler"] = compiler;
  info["isa"] = effcore::isa_name();
  info["threads"] = python::num_threads();
  info["dtypes"] = py::make_tuple("float32", "bfloat16", "float16", "float64");
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "effcore's kernels on arrays in main memory; use effcore.array";
  m.def("build_info", build_info);
  m.def("num_threads", python::num_threads);
  m.def("set_num_threads", python::set_num_threads, py::arg("count"));
  python::define_attention(m);
  python::define_routing(m);
  python::define_scan(m);
}
