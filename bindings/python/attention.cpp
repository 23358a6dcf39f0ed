// The attention family on arrays in main memory.
#include "bindings/python/attention.h"

#include "bindings/python/module.h"
#include "bindings/python/threads.h"

namespace effcore::python {
namespace {

struct Cpu {
  template <class Args>
  static void run(const Context& context, const TensorView& q, const Args& args) {
    check(q.device == DeviceKind::cpu, context.function, "q is on ", name(q.device), " but NumPy's arrays are on cpu");
    const py::gil_scoped_release no_gil;
    call(args);
  }

 private:
  static void call(const attention::Forward& args) { attention::forward(args, threads()); }
  static void call(const attention::SharedForward& args) { attention::shared_forward(args, threads()); }
  static void call(const attention::SharedBackward& args) { attention::shared_backward(args, threads()); }
  static void call(const attention::Backward& args) { attention::backward(args, threads()); }
  static void call(const attention::Decode& args) { attention::decode(args, threads()); }
  static void call(const attention::DecodeFromProbs& args) { attention::decode_from_probs(args, threads()); }
};

}  // namespace

void define_attention(py::module_& m) {
  AttentionFunctions<Cpu>::define(m);
}

}  // namespace effcore::python
