// Which tokens stay: the class token's scores and their partition, in one launch. A block takes a batch row; where there are
// fewer rows than multiprocessors and they are long, a cluster of blocks, which share out the heads, and the first of them adds
// up and selects.
//
//   scores[n] = 1/heads · sum over h of softmax_n(scale · q_h · k_g(h),n)
//
// Bound: k is read once. For some heads at a time the scores stand in shared memory (in the workspace where a row has too many
// tokens), and each thread adds up its tokens' probabilities.
#include "common/cluster.cuh"
#include "effcore/cuda/routing.h"
#include "routing/rows.cuh"
#include "routing/scores.cuh"
#include "routing/select.cuh"

namespace effcore::cuda::routing {
namespace {

constexpr int threads = 512, warps = threads / 32;
// Stages of a warp's ring: where two blocks share a multiprocessor, and where one has it alone.
constexpr int few_stages = 2, many_stages = 5;

struct PartitionParams {
  const void* scores;  // of partition_tokens
  std::int64_t scores_stride;
  ScoreParams score;  // of the others
  int blocks, heads;  // of a cluster; that each of them takes
  int tokens;
  float* scores_out;  // [B, tokens], or null: the partition
  float* workspace;   // or null: what is too large for shared memory
  std::int64_t workspace_stride;
  int keep, protect;
  std::int32_t *kept, *rest;
};

__device__ __forceinline__ void select_row(const PartitionParams& p, std::int64_t b, const std::uint32_t* keys) {
  select(keys, p.tokens, p.keep, p.protect, p.kept + b * p.keep, p.rest + b * (p.tokens - p.keep));
}

// A block a row of scores.
template <class T>
__global__ void __launch_bounds__(threads, 2) partition_kernel(const __grid_constant__ PartitionParams p) {
  extern __shared__ __align__(128) char shared[];
  const std::int64_t b = blockIdx.x;
  auto* const keys = p.workspace != nullptr ? reinterpret_cast<std::uint32_t*>(p.workspace + b * p.workspace_stride)
                                            : reinterpret_cast<std::uint32_t*>(shared);
  const T* scores = static_cast<const T*>(p.scores) + b * p.scores_stride;
  for (int n = threadIdx.x; n < p.tokens; n += threads) keys[n] = key_of(to_float(scores[n]), n < p.protect);
  __syncthreads();
  select_row(p, b, keys);
}

// A cluster of p.blocks blocks a batch row. Heads that share keys go `batch` at a time.
template <class T, int batch, int stages>
__global__ void __launch_bounds__(threads, stages == few_stages ? 2 : 1)
    score_kernel(const __grid_constant__ PartitionParams p) {
  extern __shared__ __align__(128) char shared[];
  const std::int64_t b = blockIdx.x / p.blocks;
  const int block = blockIdx.x - static_cast<int>(b) * p.blocks;
  ScoreSpace<T> space;
  space.ring = shared;
  space.queries = reinterpret_cast<T*>(shared + warps * stages * step_bytes);
  space.of_warps = reinterpret_cast<Softmax*>(space.queries + p.score.chunk * p.score.query_stride);
  space.statistics = reinterpret_cast<float2*>(space.of_warps + p.score.chunk * warps);
  space.totals = p.workspace != nullptr ? p.workspace + blockIdx.x * p.workspace_stride
                                        : reinterpret_cast<float*>(space.statistics + p.score.chunk);
  space.scores = space.totals + p.tokens;
  const int begin = block * p.heads, end = min(begin + p.heads, p.score.heads);
  score_heads<T, batch, stages>(p.score, b, begin, end, 1.0f / p.score.heads, space);
  if (p.blocks > 1) cluster_sync();
  auto* const keys = reinterpret_cast<std::uint32_t*>(space.scores);
  if (block == 0) {
    constexpr int at_once = 4;  // tokens whose sums of the other blocks are on their way together
    for (int first = threadIdx.x; first < p.tokens; first += at_once * threads) {
      float sums[at_once];
#pragma unroll
      for (int u = 0; u < at_once; ++u) sums[u] = first + u * threads < p.tokens ? space.totals[first + u * threads] : 0.0f;
      for (int i = 1; i < p.blocks; ++i)
#pragma unroll
        for (int u = 0; u < at_once; ++u)
          if (const int n = first + u * threads; n < p.tokens)
            sums[u] += p.workspace != nullptr ? space.totals[i * p.workspace_stride + n] : load_of_block(space.totals + n, i);
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        const int n = first + u * threads;
        if (n >= p.tokens) break;
        if (p.scores_out != nullptr)
          p.scores_out[b * p.tokens + n] = sums[u];
        else
          keys[n] = key_of(sums[u], n < p.protect);
      }
    }
  }
  // The others' shared memory is there until it is read.
  if (p.blocks > 1)
    cluster_sync();
  else
    __syncthreads();
  if (block == 0 && p.scores_out == nullptr) select_row(p, b, keys);
}

// Dynamic shared memory of a block that has a multiprocessor to itself, or shares it with one more, beside what the selection
// has.
struct SharedLimits {
  std::int64_t alone, with_another;

  explicit SharedLimits(const char* function) {
    constexpr std::int64_t own = 6 * 1024, of_system = 1024;
    const std::int64_t block = shared_memory_limit(function);
    const std::int64_t all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, function);
    alone = block - own, with_another = std::min(block, all / 2 - of_system) - own;
  }
};

// How a row's heads are shared out, and what a block has in shared memory or else in the workspace.
struct Plan {
  int blocks = 1, heads = 0, chunk = 0, stages = 0;  // of a row; of a block; at a time; of a ring
  std::int64_t shared = 0, workspace = 0;            // bytes and floats of a block

  // Keys alone.
  Plan(std::int64_t tokens, const char* function) {
    if (tokens * 4 <= SharedLimits(function).with_another)
      shared = tokens * 4;
    else
      workspace = tokens;
  }

  Plan(const ClassScores& args, const char* function) {
    const std::int64_t batch = std::max<std::int64_t>(args.k.size[0], 1), kv_heads = args.k.size[1], tokens = args.k.size[2];
    const std::int64_t places = device_attribute(cudaDevAttrMultiProcessorCount, function);
    // Blocks that share a row's heads, but none of its keys. Clusters of two find places wherever there are two
    // multiprocessors; larger ones leave some places free.
    const int most = tokens >= 256 && has_clusters(function) ? static_cast<int>(std::min<std::int64_t>(kv_heads, 8)) : 1;
    while (2 * blocks <= most && 2 * blocks * batch <= (blocks == 1 ? places : places - places / 8)) blocks *= 2;
    const std::int64_t group = args.q.size[1] / kv_heads, own = (kv_heads + blocks - 1) / blocks;
    blocks = static_cast<int>((kv_heads + own - 1) / own), heads = static_cast<int>(own * group);
    // A chunk of heads is so large that a warp has eight steps between the barriers, where there are so many; heads that share
    // keys stay together.
    const std::int64_t size = element_bytes(args.k.dtype), dim = args.k.size[3];
    const std::int64_t steps = (tokens + tile_tokens - 1) / tile_tokens * ((dim * size + line_bytes - 1) / line_bytes);
    const int together = static_cast<int>(std::min<std::int64_t>(group, 8));
    for (chunk = together; chunk < heads && chunk / together * steps < 8 * warps;) chunk += together;
    chunk = std::min(chunk, heads);
    const auto ring = [&](int n) { return n * warps * step_bytes; };
    const auto of_heads = [&](int n) {
      return n * (query_stride(dim, static_cast<int>(size)) * size + std::int64_t{warps * sizeof(Softmax) + sizeof(float2)});
    };
    const SharedLimits limits(function);
    const auto fits = [&](int n, std::int64_t limit) {
      stages = n, shared = ring(stages) + of_heads(chunk) + (1 + chunk) * tokens * 4;
      return shared <= limit;
    };
    for (; chunk > 0; chunk = chunk > together ? together : 0) {
      if (blocks * batch > places && fits(few_stages, limits.with_another)) return;
      if (fits(many_stages, limits.alone) || fits(few_stages, limits.alone)) return;
    }
    for (chunk = together; chunk > 1 && ring(stages) + of_heads(chunk) > limits.alone;) --chunk;
    shared = ring(stages) + of_heads(chunk), workspace = (1 + chunk) * tokens;
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

// The class token's scores, or with `select` the partition by them.
void score(const ClassScores& args, const Partition* select, const char* f, const Launch& to) {
  refuse_float64(args.q.dtype, f);
  const std::int64_t batch = args.k.size[0], tokens = args.k.size[2];
  if (batch * tokens == 0) return;
  const Plan plan(args, f);
  if (plan.shared > SharedLimits(f).alone)
    throw std::invalid_argument(std::string("effcore.") + f + ": q has head dimension " + std::to_string(args.k.size[3]) +
                                ", more than CUDA kernels take");
  PartitionParams p{};
  p.score = score_params(args), p.score.chunk = plan.chunk;
  p.blocks = plan.blocks, p.heads = plan.heads, p.tokens = p.score.tokens;
  p.workspace = plan.workspace > 0 ? static_cast<float*>(to.workspace) : nullptr, p.workspace_stride = plan.workspace;
  if (select != nullptr) {
    p.keep = static_cast<int>(select->keep), p.protect = static_cast<int>(select->protect);
    p.kept = select->kept, p.rest = select->rest;
  } else {
    p.scores_out = static_cast<float*>(args.scores);
  }
  with_type(args.q.dtype, f, [&]<class T>(T) {
    const auto start = [&](auto kernel) {
      const unsigned blocks = grid(batch * p.blocks, f);
      const auto bytes = static_cast<std::size_t>(plan.shared);
      const auto stream = static_cast<cudaStream_t>(to.stream);
      if (p.blocks > 1)
        launch_clusters(f, kernel, blocks, threads, bytes, stream, p, static_cast<unsigned>(p.blocks));
      else
        launch(f, kernel, blocks, threads, bytes, stream, p);
    };
    const bool few = plan.stages == few_stages;
    if (p.score.group > 1)
      few ? start(score_kernel<T, 8, few_stages>) : start(score_kernel<T, 8, many_stages>);
    else
      few ? start(score_kernel<T, 1, few_stages>) : start(score_kernel<T, 1, many_stages>);
  });
}

std::size_t score_workspace(const ClassScores& args, const char* f) {
  const Plan plan(args, f);
  return static_cast<std::size_t>(plan.workspace * plan.blocks * args.k.size[0]) * 4;
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
  const Plan plan(args.scores.size[1], f);
  PartitionParams p{};
  p.scores = args.scores.data, p.scores_stride = args.scores.stride[0];
  p.tokens = static_cast<int>(args.scores.size[1]);
  p.workspace = plan.workspace > 0 ? static_cast<float*>(to.workspace) : nullptr, p.workspace_stride = plan.workspace;
  p.keep = static_cast<int>(args.keep), p.protect = static_cast<int>(args.protect);
  p.kept = args.kept, p.rest = args.rest;
  with_type(args.scores.dtype, f, [&]<class T>(T) {
    launch(f, partition_kernel<T>, grid(args.scores.size[0], f), threads, static_cast<std::size_t>(plan.shared),
           static_cast<cudaStream_t>(to.stream), p);
  });
}

void class_scores(const ClassScores& args, const Launch& to) {
  score(args, nullptr, "class_scores", to);
}

void score_partition(const ScorePartition& args, const Launch& to) {
  score(args.score, &args.partition, "score_partition", to);
}

}  // namespace effcore::cuda::routing
