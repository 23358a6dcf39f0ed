// Which problems the fused kernel takes, and which it serves faster than two products of cuBLAS.
#include "common/element.cuh"
#include "common/error.h"
#include "effcore/cuda/lowrank.h"
#include "lowrank/hopper/fused.h"

namespace effcore::cuda::lowrank {
namespace {

constexpr const char* function = "lowrank_linear";

// Measured on an H200 by benchmarks/ops/lowrank_cuda.py --everywhere, with launches hidden.
constexpr Limits forward[] = {
    {.least_rows = 4096,
     .most_rows = Limits::any,
     .least_rank = 193,
     .most_rank = 256,
     .least_in = 512,
     .most_in = 1024,
     .least_out = 2048,
     .most_out = 4096},
    {.least_rows = 4096,
     .most_rows = 8192,
     .least_rank = 97,
     .most_rank = 128,
     .least_in = 512,
     .most_in = 1024,
     .least_out = 2048,
     .most_out = 4096},
    {.least_rows = 16384,
     .most_rows = Limits::any,
     .least_rank = 97,
     .most_rank = 128,
     .least_in = 2048,
     .most_in = 4096,
     .least_out = 512,
     .most_out = 1024},
    {.least_rows = 16384,
     .most_rows = Limits::any,
     .least_rank = 193,
     .most_rank = 256,
     .least_in = 2048,
     .most_in = 4096,
     .least_out = 512,
     .most_out = 1024},
};
constexpr Limits gradient[] = {
    {.least_rows = 16384,
     .most_rows = Limits::any,
     .least_rank = 97,
     .most_rank = 256,
     .least_in = 512,
     .most_in = 1024,
     .least_out = 2048,
     .most_out = 4096},
};
constexpr Limits everywhere[] = {{.least_rows = 1, .most_rows = Limits::any, .most_rank = hopper::most_rank}};

std::span<const Limits> boxes(std::span<const Limits> measured) {
  static const bool all = [] {
    const char* text = std::getenv("EFFCORE_LOWRANK_EVERYWHERE");
    return text != nullptr && text[0] == '1';
  }();
  return all ? everywhere : measured;
}

bool on_hopper() {
#ifdef EFFCORE_HOPPER
  return device_attribute(cudaDevAttrComputeCapabilityMajor, function) == 9;
#else
  return false;
#endif
}

bool usable(DType dtype) {
  return (dtype == DType::bfloat16 || dtype == DType::float16) && on_hopper();
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

std::span<const Limits> limits(DType dtype) {
  return usable(dtype) ? boxes(forward) : std::span<const Limits>{};
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
  if (!usable(args.dz.dtype) || !effcore::lowrank::within(boxes(gradient), args.dz.dtype, args.dz.size[0], args.up.size[0],
                                                          args.down.size[0], args.down.size[1]))
    return false;
  return aligned(args.dz) && aligned(args.up) && aligned(args.down);
}

void input_gradient(const InputGradient& args, const Launch& launch) {
  hopper::FusedProblem problem{args.dz, args.up, args.down, args.dx, true};
  problem.hidden = args.dhidden;
  if (!fused(problem, launch)) refused();
}

}  // namespace effcore::cuda::lowrank
