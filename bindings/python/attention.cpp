// The attention family on arrays in main memory.
#include "bindings/python/attention.h"

#include "bindings/python/backend.h"
#include "bindings/python/module.h"

namespace effcore::python {
namespace {

struct Cpu {
  template <class Args>
  static void run(const Context& context, const TensorView& q, const Args& args) {
    run_on_cpu(context, "q", q, [&](const Threads& threads) { call(args, threads); });
  }

 private:
  static void call(const attention::Forward& args, const Threads& threads) { attention::forward(args, threads); }
  static void call(const attention::SharedForward& args, const Threads& threads) { attention::shared_forward(args, threads); }
  static void call(const attention::SharedBackward& args, const Threads& threads) { attention::shared_backward(args, threads); }
  static void call(const attention::Backward& args, const Threads& threads) { attention::backward(args, threads); }
  static void call(const attention::Decode& args, const Threads& threads) { attention::decode(args, threads); }
  static void call(const attention::DecodeFromProbs& args, const Threads& threads) {
    attention::decode_from_probs(args, threads);
  }
};

}  // namespace

void define_attention(py::module_& m) {
  AttentionFunctions<Cpu>::define(m);
}

}  // namespace effcore::python
