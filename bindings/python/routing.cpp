// The routing family on arrays in main memory.
#include "bindings/python/routing.h"

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
  static void call(const routing::Partition& args, const Threads& threads) { routing::partition(args, threads); }
  static void call(const routing::ClassScores& args, const Threads& threads) { routing::class_scores(args, threads); }
  static void call(const routing::ScorePartition& args, const Threads& threads) { routing::score_partition(args, threads); }
  static void call(const routing::Gather& args, const Threads& threads) { routing::gather(args, threads); }
  static void call(const routing::Merge& args, const Threads& threads) { routing::merge(args, threads); }
  static void call(const routing::Scatter& args, const Threads& threads) { routing::scatter(args, threads); }
  static void call(const routing::GatherNorm& args, const Threads& threads) { routing::gather_norm(args, threads); }
  static void call(const routing::GatherNormBackward& args, const Threads& threads) {
    routing::gather_norm_backward(args, threads);
  }
};

}  // namespace

void define_routing(py::module_& m) {
  RoutingFunctions<Cpu>::define(m);
}

}  // namespace effcore::python
