// Which problems the fused kernel takes, and which it serves faster than two products of cuBLAS.
#include "common/element.cuh"
#include "common/error.h"
#include "effcore/cuda/lowrank.h"
#include "lowrank/hopper/fused.h"

namespace effcore::cuda::lowrank {
namespace {

constexpr const char* function = "lowrank_linear";

bool on_hopper() {
#ifdef EFFCORE_HOPPER
  return device_attribute(cudaDevAttrComputeCapabilityMajor, function) == 9;
#else
  return false;
#endif
}

bool fused(const hopper::FusedProblem& problem, const Launch& launch) {
#ifdef EFFCORE_HOPPER
  return problem.x.dtype == DType::bfloat16 ? hopper::fused_instance<bf16>(problem, launch)
                                            : hopper::fused_instance<fp16>(problem, launch);
#else
  return false;
#endif
}

[[noreturn]] void refused() {
  throw std::runtime_error("effcore.lowrank_linear: the driver refused a tensor map");
}

// Rows start at multiples of 16 bytes, and sizes fit a tensor map.
bool aligned(const TensorView& t) {
  constexpr std::int64_t most = std::int64_t{1} << 30;
  return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && t.size[0] > 0 && t.size[0] < most && t.size[1] > 0 &&
         t.size[1] < most && t.size[1] % 8 == 0 && (t.size[0] == 1 || (t.stride[0] > 0 && t.stride[0] % 8 == 0));
}

}  // namespace

Limits limits(DType dtype) {
  Limits l;
  if ((dtype != DType::bfloat16 && dtype != DType::float16) || !on_hopper()) return l;
  l.least_rows = 256;
  l.most_rows = std::int64_t{1} << 30;
  l.most_rank = hopper::most_rank;
  return l;
}

bool takes(const Linear& args) {
  return aligned(args.x) && aligned(args.down) && aligned(args.up) && args.up.size[0] % 8 == 0 &&
         (args.bias == nullptr || reinterpret_cast<std::uintptr_t>(args.bias->data) % 4 == 0);
}

void linear(const Linear& args, const Launch& launch) {
  hopper::FusedProblem problem{args.x, args.down, args.up, args.out, false};
  problem.bias = args.bias != nullptr ? args.bias->data : nullptr;
  problem.hidden = args.hidden, problem.before = args.before;
  problem.activation = args.activation;
  if (!fused(problem, launch)) refused();
}

bool takes(const InputGradient& args) {
  const Limits l = limits(args.dz.dtype);
  const std::int64_t rows = args.dz.size[0];
  if (rows < l.least_rows || rows > l.most_rows || args.down.size[0] > l.most_rank) return false;
  return aligned(args.dz) && aligned(args.up) && aligned(args.down);
}

void input_gradient(const InputGradient& args, const Launch& launch) {
  hopper::FusedProblem problem{args.dz, args.up, args.down, args.dx, true};
  problem.hidden = args.dhidden;
  if (!fused(problem, launch)) refused();
}

}  // namespace effcore::cuda::lowrank
