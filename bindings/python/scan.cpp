// The scan family on arrays in main memory.
#include "bindings/python/scan.h"

#include "bindings/python/backend.h"
#include "bindings/python/module.h"

namespace effcore::python {
namespace {

struct Cpu {
  template <class Args>
  static void run(const Context& context, const char* argument, const TensorView& leader, const Args& args) {
    run_on_cpu(context, argument, leader, [&](const Threads& threads) { call(args, threads); });
  }

 private:
  static void call(const scan::CausalConv& args, const Threads& threads) { scan::causal_conv(args, threads); }
  static void call(const scan::CausalConvBackward& args, const Threads& threads) { scan::causal_conv_backward(args, threads); }
  static void call(const scan::Scan& args, const Threads& threads) { scan::selective_scan(args, threads); }
  static void call(const scan::ScanBackward& args, const Threads& threads) { scan::selective_scan_backward(args, threads); }
  static void call(const scan::Step& args, const Threads& threads) { scan::selective_step(args, threads); }
};

}  // namespace

void define_scan(py::module_& m) {
  ScanFunctions<Cpu>::define(m);
}

}  // namespace effcore::python
