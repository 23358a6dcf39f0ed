// How the array functions run a kernel in main memory: without the GIL, on the threads of set_num_threads.
#pragma once
#include "bindings/python/dlpack.h"
#include "bindings/python/threads.h"

namespace effcore::python {

// function(threads); `leader` is the array that says where the call runs.
template <class Function>
void run_on_cpu(const Context& context, const char* argument, const TensorView& leader, const Function& function) {
  check(leader.device == DeviceKind::cpu, context.function, argument, " is on ", name(leader.device),
        " but NumPy's arrays are on cpu");
  const py::gil_scoped_release no_gil;
  function(threads());
}

}  // namespace effcore::python
