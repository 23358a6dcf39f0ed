// One `define_<family>` for each family, called by module.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace effcore::python {

void define_attention(pybind11::module_& m);
void define_routing(pybind11::module_& m);
void define_scan(pybind11::module_& m);

}  // namespace effcore::python
