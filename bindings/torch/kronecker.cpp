// The kronecker family's schemas and its CPU kernels under torch.
#include "bindings/torch/kronecker.h"

#include "bindings/torch/threads.h"

namespace effcore::binding {
namespace {

struct Cpu {
  static void run(const kronecker::GroupedGram& args, const Tensor&) { kronecker::grouped_gram(args, threads()); }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY_FRAGMENT(effcore, m) {
  // Two ops rather than one with an optional out: Inductor (torch 2.13) fails on an op that may mutate and does not.
  m.def("grouped_gram(Tensor x, Tensor offsets, float alpha) -> Tensor");
  m.def("grouped_gram_(Tensor(a!) out, Tensor x, Tensor offsets, float alpha, float beta) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effcore, CPU, m) {
  effcore::binding::KroneckerOps<effcore::binding::Cpu>::implement(m);
}
