// Which tokens stay: the class token's scores and their partition. One block a batch row and one launch in all, unless there
// are so few rows that their heads are shared out among blocks, no more than fill the GPU once; then a second launch adds up
// and selects.
//
//   scores[n] = 1/heads · sum over h of softmax_n(scale · q_h · k_g(h),n)
//
// Bound: k is read once. For some heads at a time the scores stand in shared memory (in the workspace where a row has too many
// tokens), and each thread adds up its tokens' probabilities.
#include "common/overlap.cuh"
#include "effcore/cuda/routing.h"
#include "routing/rows.cuh"
#include "routing/scores.cuh"
#include "routing/select.cuh"

namespace effcore::cuda::routing {
namespace {

constexpr int threads = 512, warps = threads / 32, stages = 2;

struct PartitionParams {
  // One of three: scores, the class token's q and all k, or totals of parts of the heads.
  const void* scores;
  std::int64_t scores_stride;
  ScoreParams score;
  float* partial;  // [B, parts, tokens]: written with k, read without
  int parts;
  int splits, split_heads;  // parts of the heads in this launch, each of so many
  int tokens;
  float* scores_out;  // [B, tokens], or null
  float* workspace;   // or null: what is too large for shared memory
  std::int64_t workspace_stride;
  bool selects;
  int keep, protect;
  std::int32_t *kept, *rest;
};

// Adds up the parts of row b, several of a thread's tokens on their way together.
__device__ __forceinline__ void add_parts(const PartitionParams& p, std::int64_t b, std::uint32_t* keys) {
  constexpr int at_once = 4;
  const float* const partial = p.partial + b * p.parts * p.tokens;
  for (int begin = threadIdx.x; begin < p.tokens; begin += at_once * threads) {
    float sums[at_once] = {};
#pragma unroll 4
    for (int i = 0; i < p.parts; ++i)
#pragma unroll
      for (int u = 0; u < at_once; ++u)
        if (const int n = begin + u * threads; n < p.tokens) sums[u] += partial[static_cast<std::int64_t>(i) * p.tokens + n];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int n = begin + u * threads;
      if (n >= p.tokens) break;
      if (p.scores_out != nullptr) p.scores_out[b * p.tokens + n] = sums[u];
      keys[n] = key_of(sums[u], n < p.protect);
    }
  }
}

// A block for each batch row, or (p.splits > 1) for each part of its heads; the totals of the parts then go to `partial`, and a
// second launch adds them up and selects. Heads that share keys go `batch` at a time.
template <class T, int batch>
__global__ void __launch_bounds__(threads, 2) partition_kernel(const __grid_constant__ PartitionParams p) {
  extern __shared__ __align__(128) char shared[];
  const std::int64_t b = blockIdx.x / p.splits;
  const int part = blockIdx.x - static_cast<int>(b) * p.splits;
  if (p.score.k == nullptr) {
    auto* const keys = reinterpret_cast<std::uint32_t*>(p.workspace != nullptr ? p.workspace + blockIdx.x * p.workspace_stride
                                                                               : reinterpret_cast<float*>(shared));
    if (p.partial != nullptr) {
      wait_for_kernel_before();
      add_parts(p, b, keys);
    } else {
      const T* scores = static_cast<const T*>(p.scores) + b * p.scores_stride;
      for (int n = threadIdx.x; n < p.tokens; n += threads) keys[n] = key_of(to_float(scores[n]), n < p.protect);
    }
    if (!p.selects) return;
    __syncthreads();
    select(keys, p.tokens, p.keep, p.protect, p.kept + b * p.keep, p.rest + b * (p.tokens - p.keep));
    return;
  }
  if (p.splits > 1) let_next_kernel_begin();
  ScoreSpace<T> space;
  space.ring = shared;
  space.queries = reinterpret_cast<T*>(shared + warps * stages * step_bytes);
  space.of_warps = reinterpret_cast<Softmax*>(space.queries + p.score.chunk * p.score.query_stride);
  space.statistics = reinterpret_cast<float2*>(space.of_warps + p.score.chunk * warps);
  space.totals = p.workspace != nullptr ? p.workspace + blockIdx.x * p.workspace_stride
                                        : reinterpret_cast<float*>(space.statistics + p.score.chunk);
  space.scores = space.totals + p.tokens;
  const int begin = part * p.split_heads, end = min(begin + p.split_heads, p.score.heads);
  score_heads<T, batch, stages>(p.score, b, begin, end, 1.0f / p.score.heads, space);
  if (float* const out = p.splits > 1 ? p.partial : p.scores_out; out != nullptr)
    for (int n = threadIdx.x; n < p.tokens; n += threads)
      out[static_cast<std::int64_t>(blockIdx.x) * p.tokens + n] = space.totals[n];
  if (!p.selects) return;
  auto* const keys = reinterpret_cast<std::uint32_t*>(space.totals);
  for (int n = threadIdx.x; n < p.tokens; n += threads) keys[n] = key_of(space.totals[n], n < p.protect);
  __syncthreads();
  select(keys, p.tokens, p.keep, p.protect, p.kept + b * p.keep, p.rest + b * (p.tokens - p.keep));
}

// How many parts a batch row's heads go to: where there are fewer rows than places for blocks, more, but no keys are read
// twice.
struct Parts {
  int count, heads;  // heads of a part

  Parts(const ClassScores& args, const char* function) {
    const std::int64_t places = 2 * device_attribute(cudaDevAttrMultiProcessorCount, function);
    const std::int64_t kv_heads = args.k.size[1], batch = std::max<std::int64_t>(args.k.size[0], 1);
    const std::int64_t wanted = args.k.size[2] < 256 ? 1 : std::clamp<std::int64_t>(places / batch, 1, kv_heads);
    const std::int64_t kv_heads_each = (kv_heads + wanted - 1) / wanted;
    heads = static_cast<int>(kv_heads_each * (args.q.size[1] / kv_heads));
    count = static_cast<int>((kv_heads + kv_heads_each - 1) / kv_heads_each);
  }
};

// Dynamic shared memory with which two blocks fit a multiprocessor, or with which one does, beside what the selection has.
std::int64_t most_shared(int blocks, const char* function) {
  constexpr std::int64_t own = 6 * 1024, of_system = 1024;
  const std::int64_t all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, function);
  return std::min<std::int64_t>(shared_memory_limit(function), all / blocks - of_system) - own;
}

// Shared memory, the chunk of heads, and what must go to the workspace instead.
struct Plan {
  int chunk = 0;
  std::int64_t shared = 0, workspace = 0;  // bytes a block; floats a block

  // Keys alone.
  Plan(std::int64_t tokens, const char* function) {
    if (tokens * 4 <= most_shared(2, function))
      shared = tokens * 4;
    else
      workspace = tokens;
  }
  // The chunk is so large that a warp has eight steps between the barriers, where there are so many; heads that share keys are
  // together.
  Plan(const ClassScores& args, int heads, const char* function) {
    const std::int64_t tokens = args.k.size[2], size = element_bytes(args.k.dtype);
    const std::int64_t steps = (tokens + tile_tokens - 1) / tile_tokens * ((args.k.size[3] * size + line_bytes - 1) / line_bytes);
    const int together = static_cast<int>(std::min<std::int64_t>(args.q.size[1] / args.k.size[1], 8));
    const auto of_heads = [&](int n) {
      return warps * stages * step_bytes + n * (query_stride(args.k.size[3], static_cast<int>(size)) * size + warps * 8 + 8);
    };
    const auto bytes = [&](int n) { return of_heads(n) + (1 + n) * tokens * 4; };
    for (chunk = together; chunk < heads && chunk / together * steps < 8 * warps;) chunk += together;
    chunk = std::min(chunk, heads);
    for (const int blocks : {2, 1}) {
      int fits = chunk;
      while (fits > 1 && bytes(fits) > most_shared(blocks, function)) --fits;
      if (bytes(fits) > most_shared(blocks, function)) continue;
      chunk = fits, shared = bytes(fits);
      return;
    }
    while (chunk > 1 && of_heads(chunk) > most_shared(1, function)) --chunk;
    shared = of_heads(chunk);
    workspace = tokens * (1 + chunk);
  }
};

ScoreParams score_params(const ClassScores& args) {
  const TensorView &q = args.q, &k = args.k;
  ScoreParams p{};
  p.q = q.data, p.k = k.data;
  for (int d = 0; d < 2; ++d) p.q_stride[d] = q.stride[d];
  for (int d = 0; d < 3; ++d) p.k_stride[d] = k.stride[d];
  p.tokens = static_cast<int>(k.size[2]), p.heads = static_cast<int>(q.size[1]);
  p.group = static_cast<int>(q.size[1] / k.size[1]), p.dim = static_cast<int>(k.size[3]);
  const int wide = 16 / element_bytes(k.dtype);
  p.vectors = reinterpret_cast<std::uintptr_t>(k.data) % 16 == 0 && p.dim % wide == 0;
  for (int d = 0; d < 3; ++d) p.vectors = p.vectors && (k.size[d] <= 1 || k.stride[d] % wide == 0);
  p.factor = static_cast<float>(args.scale * 1.4426950408889634);
  p.query_stride = query_stride(k.size[3], element_bytes(k.dtype));
  return p;
}

void run(PartitionParams p, DType dtype, std::int64_t batch, const Plan& plan, float* workspace, const char* f,
         const Launch& to) {
  if (plan.shared > most_shared(1, f))
    throw std::invalid_argument(std::string("effcore.") + f + ": q has head dimension " + std::to_string(p.score.dim) +
                                ", more than CUDA kernels take");
  p.score.chunk = plan.chunk;
  p.workspace = plan.workspace > 0 ? workspace : nullptr;
  p.workspace_stride = plan.workspace;
  p.splits = std::max(p.splits, 1);
  with_type(dtype, f, [&]<class T>(T) {
    const auto start = [&](auto kernel) {
      const unsigned blocks = grid(batch * p.splits, f);
      const auto bytes = static_cast<std::size_t>(plan.shared);
      const auto stream = static_cast<cudaStream_t>(to.stream);
      if (p.score.k == nullptr && p.partial != nullptr)
        launch_overlapping(f, kernel, blocks, threads, bytes, stream, p);
      else
        launch(f, kernel, blocks, threads, bytes, stream, p);
    };
    p.score.group > 1 ? start(partition_kernel<T, 8>) : start(partition_kernel<T, 1>);
  });
}

// Floats of the workspace: the parts' totals, and what the blocks of either launch have no room for in shared memory.
struct ScoreWorkspace {
  std::int64_t partial, scratch;

  ScoreWorkspace(const ClassScores& args, const Parts& parts, const Plan& plan, const Plan& last) {
    const std::int64_t batch = args.k.size[0];
    partial = parts.count > 1 ? (batch * parts.count * args.k.size[2] + 63) / 64 * 64 : 0;
    scratch = std::max(plan.workspace * batch * parts.count, last.workspace * batch);
  }
  std::size_t bytes() const { return static_cast<std::size_t>(partial + scratch) * 4; }
};

std::size_t score_workspace(const ClassScores& args, const char* f) {
  const Parts parts(args, f);
  return ScoreWorkspace(args, parts, Plan(args, parts.heads, f), Plan(args.k.size[2], f)).bytes();
}

// With `select` the partition too, in one launch unless the heads of a row are shared out.
void score(const ClassScores& args, const Partition* select, const char* f, const Launch& to) {
  refuse_float64(args.q.dtype, f);
  const std::int64_t batch = args.k.size[0], tokens = args.k.size[2];
  if (batch * tokens == 0) return;
  const Parts parts(args, f);
  const Plan plan(args, parts.heads, f), last(tokens, f);
  const ScoreWorkspace space(args, parts, plan, last);
  auto* const workspace = static_cast<float*>(to.workspace);
  PartitionParams p{};
  p.score = score_params(args), p.tokens = p.score.tokens;
  p.splits = parts.count, p.split_heads = parts.heads;
  p.scores_out = select == nullptr ? static_cast<float*>(args.scores) : nullptr;
  if (select != nullptr) {
    p.keep = static_cast<int>(select->keep), p.protect = static_cast<int>(select->protect);
    p.kept = select->kept, p.rest = select->rest;
  }
  p.selects = select != nullptr && parts.count == 1;
  p.partial = parts.count > 1 ? workspace : nullptr;
  run(p, args.q.dtype, batch, plan, workspace + space.partial, f, to);
  if (parts.count == 1) return;
  p.score = {};
  p.parts = parts.count, p.splits = 1;
  p.selects = select != nullptr;
  run(p, DType::float32, batch, last, workspace + space.partial, f, to);
}

}  // namespace

std::size_t workspace_bytes(const Partition& args) {
  return static_cast<std::size_t>(Plan(args.scores.size[1], "partition_tokens").workspace * args.scores.size[0]) * 4;
}
std::size_t workspace_bytes(const ClassScores& args) {
  return score_workspace(args, "class_scores");
}
std::size_t workspace_bytes(const ScorePartition& args) {
  return score_workspace(args.score, "score_partition");
}

void partition(const Partition& args, const Launch& to) {
  const char* f = "partition_tokens";
  refuse_float64(args.scores.dtype, f);
  if (args.scores.size[1] == 0) return;
  PartitionParams p{};
  p.scores = args.scores.data, p.scores_stride = args.scores.stride[0];
  p.tokens = static_cast<int>(args.scores.size[1]);
  p.selects = true;
  p.keep = static_cast<int>(args.keep), p.protect = static_cast<int>(args.protect);
  p.kept = args.kept, p.rest = args.rest;
  run(p, args.scores.dtype, args.scores.size[0], Plan(args.scores.size[1], f), static_cast<float*>(to.workspace), f, to);
}

void class_scores(const ClassScores& args, const Launch& to) {
  score(args, nullptr, "class_scores", to);
}

void score_partition(const ScorePartition& args, const Launch& to) {
  score(args.score, &args.partition, "score_partition", to);
}

}  // namespace effcore::cuda::routing
