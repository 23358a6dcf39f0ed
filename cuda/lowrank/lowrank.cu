// The fused kernel's launch: which instantiation, how many blocks share the columns of one tile of rows.
#include "common/error.h"
#include "effcore/cuda/lowrank.h"
#include "lowrank/fused.cuh"

namespace effcore::cuda::lowrank {
namespace {

constexpr const char* function = "lowrank_linear";
constexpr int most_rank = 256;

bool hopper() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, function) == 9;
}

// With few tiles of rows several blocks each take a part of the columns, and all of them compute H.
int splits(std::int64_t tiles, std::int64_t in, std::int64_t columns) {
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, function);
  int best = 1;
  double least = 1e300;
  for (int s = 1; s <= 8 && columns / s >= 256; ++s) {
    const double waves = static_cast<double>((tiles * s + multiprocessors - 1) / multiprocessors);
    const double time = waves * (static_cast<double>(in) + static_cast<double>(columns) / s);
    if (time < 0.97 * least) least = time, best = s;
  }
  return best;
}

template <class Config>
void run(const Linear& args, const Launch& launch) {
  FusedParams p;
  p.x = args.x.data, p.down = args.down.data, p.up = args.up.data;
  p.bias = args.bias != nullptr ? args.bias->data : nullptr;
  p.out = args.out.data, p.hidden = args.hidden, p.before = args.before;
  p.x_stride = args.x.stride[0], p.down_stride = args.down.stride[0], p.up_stride = args.up.stride[0];
  p.out_stride = args.out.stride[0];
  p.rows = args.x.size[0];
  p.in = static_cast<int>(args.x.size[1]), p.rank = static_cast<int>(args.down.size[0]);
  p.columns = static_cast<int>(args.up.size[0]);
  p.activation = args.activation;
  const std::int64_t tiles = (p.rows + Config::rows - 1) / Config::rows;
  const int parts = splits(tiles, p.in, p.columns), whole = (p.columns + Config::columns - 1) / Config::columns;
  p.split_columns = (whole + parts - 1) / parts * Config::columns;
  const dim3 grid(static_cast<unsigned>(tiles), (p.columns + p.split_columns - 1) / p.split_columns);
  check(cudaFuncSetAttribute(fused_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::shared_bytes),
        function);
  fused_kernel<Config><<<grid, Config::threads, Config::shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(p);
  check_launch(function);
}

template <class T>
void run_rank(const Linear& args, const Launch& launch) {
  const std::int64_t rank = args.down.size[0];
#ifndef EFFCORE_CUDA_SET_CI
  if (rank <= 64) return run<Fused<T, 64, 128, 6>>(args, launch);
  if (rank <= 128) return run<Fused<T, 128, 128, 5>>(args, launch);
#endif
  return run<Fused<T, 256, 64, 4>>(args, launch);
}

bool aligned(const TensorView& t) {
  return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && t.size[1] % 8 == 0 && (t.size[0] <= 1 || t.stride[0] % 8 == 0);
}

}  // namespace

// The kernel has been compiled for sm_90a and not yet run: until tests/cuda/check_lowrank.py has passed on a GPU, and measured
// where it wins, it serves nobody who did not ask for it by EFFCORE_LOWRANK_FUSED=1.
Limits limits(DType dtype) {
  static const bool wanted = [] {
    const char* text = std::getenv("EFFCORE_LOWRANK_FUSED");
    return text != nullptr && text[0] == '1';
  }();
  Limits l;
  if (!wanted || (dtype != DType::bfloat16 && dtype != DType::float16) || !hopper()) return l;
  l.least_rows = 2048;
  l.most_rows = std::int64_t{1} << 40;
  l.most_rank = most_rank;
  return l;
}

bool takes(const Linear& args) {
  constexpr std::int64_t most = std::int64_t{1} << 30;
  return aligned(args.x) && aligned(args.down) && aligned(args.up) && args.up.size[0] % 8 == 0 && args.x.size[1] > 0 &&
         args.x.size[1] < most && args.up.size[0] < most && args.down.size[0] > 0 &&
         (args.bias == nullptr || reinterpret_cast<std::uintptr_t>(args.bias->data) % 4 == 0);
}

void linear(const Linear& args, const Launch& launch) {
  if (args.x.size[0] * args.up.size[0] == 0) return;
  if (args.x.dtype == DType::bfloat16)
    run_rank<bf16>(args, launch);
  else
    run_rank<fp16>(args, launch);
}

}  // namespace effcore::cuda::lowrank
