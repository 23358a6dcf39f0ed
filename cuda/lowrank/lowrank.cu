// Which problems the fused kernel takes, and which it serves faster than two products of cuBLAS.
#include "common/element.cuh"
#include "common/path.h"
#include "effcore/cuda/lowrank.h"
#include "lowrank/hopper/fused.h"

namespace effcore::cuda::lowrank {
namespace {

// Measured on an H200 (benchmarks/ops/lowrank_cuda.py --everywhere --pointwise, launches hidden): boxes around points where the
// kernel won. It wins where x and out are large and the factors small, as in 1x1 convolutions; few rows leave multiprocessors
// idle. The ratios are those with a bias; without one they begin at 1.04. `gradient` is of dz [rows, in] to dx [rows, out].
constexpr std::int64_t any = Limits::any;
constexpr Limits box_of(std::int64_t least_rows, std::int64_t most_rows, std::int64_t least_rank, std::int64_t most_rank,
                        std::int64_t least_in, std::int64_t most_in, std::int64_t least_out, std::int64_t most_out) {
  return {least_rows, most_rows, 0, least_rank, most_rank, least_in, most_in, least_out, most_out};
}
constexpr Limits forward[] = {
    box_of(50000, any, 24, 176, 64, 1024, 128, 512),       // 1.21-1.65x two products; 256 -> 64 gains nothing
    box_of(50000, any, 24, 176, 64, 256, 256, 1024),       // 1.33-1.56x
    box_of(4096, any, 193, 256, 512, 1024, 2048, 3072),    // 1.16-1.38x
    box_of(4096, any, 97, 128, 512, 1024, 2048, 3072),     // 1.10-1.32x
    box_of(16384, any, 97, 128, 1536, 2048, 4096, 5632),   // 1.11-1.20x
    box_of(16384, any, 193, 256, 1536, 2048, 4096, 5632),  // 1.21-1.28x, training 1.02-1.06x
    box_of(16384, 32768, 97, 128, 3072, 4096, 512, 768),   // 1.15-1.22x; at 65536 rows training loses
    box_of(16384, any, 193, 256, 3072, 4096, 512, 768),    // 1.10-1.23x
};
constexpr Limits gradient[] = {
    box_of(50000, 131072, 97, 176, 256, 1024, 256, 1024),  // the whole backward 1.02-1.03x
    box_of(8192, any, 193, 256, 512, 1024, 2048, 3072),    // 1.03-1.08x
    box_of(4096, 32768, 97, 128, 512, 1024, 2048, 3072),   // 1.03-1.06x
    box_of(16384, 32768, 97, 128, 3072, 4096, 512, 768),   // 1.07x
    box_of(16384, 32768, 193, 256, 3072, 4096, 512, 768),  // 1.04x
};
constexpr Limits everywhere[] = {box_of(1, any, 1, hopper::most_rank, 1, any, 1, any)};

std::span<const Limits> boxes(std::span<const Limits> measured) {
  static const bool all = [] {
    const char* text = std::getenv("EFFCORE_LOWRANK_EVERYWHERE");
    return text != nullptr && text[0] == '1';
  }();
  return all ? everywhere : measured;
}

bool usable(DType dtype) {
  return (dtype == DType::bfloat16 || dtype == DType::float16) && on_hopper("lowrank_linear");
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
         (args.bias == nullptr || reinterpret_cast<std::uintptr_t>(args.bias->data) % 16 == 0);
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

const char* path(DType dtype) {
  if (const char* none = path_refusal(dtype)) return none;
  return usable(dtype) ? "wgmma sm_90a" : "cublas";
}

}  // namespace effcore::cuda::lowrank
