// Which tokens stay: the class token's scores and their partition. One block a batch row and one launch in all, unless there
// are so few rows that their heads are shared out among blocks, no more than fill the GPU once; then a second launch adds up
// and selects. Long rows, of which one block or two each fill the GPU, are long_rows.cuh's: one launch too.
//
//   scores[n] = 1/heads · sum over h of softmax_n(scale · q_h · k_g(h),n)
//
// Bound: k is read once. For some heads at a time the scores stand in shared memory (in the workspace where a row has too many
// tokens); then warps find each head's maximum and sum, and each thread adds up its tokens' probabilities, head after head, so
// that the sums have one order.
#include "effcore/cuda/routing.h"
#include "routing/long_rows.cuh"
#include "routing/rows.cuh"
#include "routing/scores.cuh"
#include "routing/select.cuh"

namespace effcore::cuda::routing {
namespace {

// Shared memory that every GPU since sm_80 gives a block, less what the selection has of its own.
constexpr std::int64_t most_shared = 90 * 1024;
// float32 with shared keys: a thread has the sums of `batch` heads: more registers, fewer threads. Either way two blocks a
// multiprocessor.
template <class T, int batch>
constexpr int threads_of = !is_16bit<T> && batch > 1 ? 256 : 512;

struct PartitionParams {
  // One of three: scores, the class token's q and all k, or totals of parts of the heads.
  const void* scores;
  std::int64_t scores_stride;
  ScoreParams score;
  float* partial;  // [B, parts, tokens]: written with k, read without
  int parts;
  int splits, split_heads;  // parts of the heads in this launch, each of so many
  int tokens, head_chunk;
  float* scores_out;  // [B, tokens], or null
  float* workspace;   // or null: what is too large for shared memory
  std::int64_t workspace_stride;
  bool selects;
  int keep, protect;
  std::int32_t *kept, *rest;
};

// A block for each batch row, or (p.splits > 1) for each part of its heads; the totals of the parts then go to `partial`, and a
// second launch adds them up and selects.
template <class T, int batch>
__global__ void __launch_bounds__(threads_of<T, batch>, 2) partition_kernel(const __grid_constant__ PartitionParams p) {
  extern __shared__ __align__(16) char shared[];
  const std::int64_t b = blockIdx.x / p.splits;
  const int part = blockIdx.x - static_cast<int>(b) * p.splits;
  // [queries of a chunk of heads][their statistics][totals or keys][scores of the chunk]: the last two in the workspace where
  // it is given
  T* const queries = reinterpret_cast<T*>(shared);
  auto* const statistics = reinterpret_cast<float2*>(queries + p.head_chunk * p.score.query_stride);
  float* const totals = p.workspace != nullptr
                            ? p.workspace + blockIdx.x * p.workspace_stride
                            : reinterpret_cast<float*>(statistics + (p.score.k != nullptr ? most_statistics(p.head_chunk) : 0));
  auto* const keys = reinterpret_cast<std::uint32_t*>(totals);
  if (p.score.k != nullptr) {
    float* const scores = totals + p.tokens;
    const int begin = part * p.split_heads, end = min(begin + p.split_heads, p.score.heads);
    for (int first = begin; first < end; first += p.head_chunk) {
      const int count = min(p.head_chunk, end - first);
      load_queries(p.score, b, first, count, queries);
      __syncthreads();
      score_heads<T, batch>(p.score, b, queries, first, count, scores);
      __syncthreads();
      softmax_statistics(scores, p.tokens, count, 1.0f / p.score.heads, statistics);
      __syncthreads();
      for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) {
        float total = first == begin ? 0.0f : totals[n];
        for (int h = 0; h < count; ++h)
          total += exp2f(scores[static_cast<std::int64_t>(h) * p.tokens + n] - statistics[h].x) * statistics[h].y;
        totals[n] = total;
      }
      __syncthreads();
    }
    float* const out = p.splits > 1 ? p.partial : p.scores_out;
    if (out != nullptr)
      for (int n = threadIdx.x; n < p.tokens; n += blockDim.x)
        out[static_cast<std::int64_t>(blockIdx.x) * p.tokens + n] = totals[n];
    if (!p.selects) return;
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) keys[n] = key_of(totals[n], n < p.protect);
  } else if (p.partial != nullptr) {
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) {
      float sum = 0.0f;
      for (int i = 0; i < p.parts; ++i) sum += p.partial[(b * p.parts + i) * p.tokens + n];
      if (p.scores_out != nullptr) p.scores_out[b * p.tokens + n] = sum;
      keys[n] = key_of(sum, n < p.protect);
    }
    if (!p.selects) return;
  } else {
    const T* scores = static_cast<const T*>(p.scores) + b * p.scores_stride;
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) keys[n] = key_of(to_float(scores[n]), n < p.protect);
  }
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

// Shared memory, the chunk of heads, and what must go to the workspace instead.
struct Plan {
  int head_chunk = 0;
  std::int64_t shared = 0, workspace = 0;  // bytes a block; floats a block

  // Keys alone.
  explicit Plan(std::int64_t tokens) {
    if (tokens * 4 <= most_shared)
      shared = tokens * 4;
    else
      workspace = tokens;
  }
  Plan(const ClassScores& args, std::int64_t heads) {
    const std::int64_t tokens = args.k.size[2], size = element_bytes(args.k.dtype);
    const std::int64_t query = query_stride(args.k.size[3], static_cast<int>(size)) * size;
    const auto of_heads = [&](int chunk) { return chunk * query + most_statistics(chunk) * 8; };
    const auto bytes = [&](int chunk) { return of_heads(chunk) + (1 + chunk) * tokens * 4; };
    for (head_chunk = static_cast<int>(heads); head_chunk > 1 && bytes(head_chunk) > most_shared;) --head_chunk;
    shared = bytes(head_chunk);
    if (shared <= most_shared) return;
    for (head_chunk = static_cast<int>(std::min<std::int64_t>(heads, 8)); head_chunk > 1 && of_heads(head_chunk) > most_shared;)
      --head_chunk;
    shared = of_heads(head_chunk);
    workspace = tokens * (1 + head_chunk);
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
  for (p.lanes = 1; p.lanes < 32 && p.lanes * wide < p.dim;) p.lanes *= 2;
  p.factor = static_cast<float>(args.scale * 1.4426950408889634);
  p.query_stride = query_stride(k.size[3], element_bytes(k.dtype));
  return p;
}

void run(PartitionParams p, DType dtype, std::int64_t batch, const Plan& plan, float* workspace, const char* f,
         const Launch& to) {
  if (plan.shared > most_shared)
    throw std::invalid_argument(std::string("effcore.") + f + ": q has head dimension " + std::to_string(p.score.dim) +
                                ", more than CUDA kernels take");
  p.head_chunk = plan.head_chunk;
  p.workspace = plan.workspace > 0 ? workspace : nullptr;
  p.workspace_stride = plan.workspace;
  p.splits = std::max(p.splits, 1);
  with_type(dtype, f, [&]<class T>(T) {
    const auto start = [&](auto kernel, int threads) {
      launch(f, kernel, grid(batch * p.splits, f), threads, static_cast<std::size_t>(plan.shared),
             static_cast<cudaStream_t>(to.stream), p);
    };
    if (is_16bit<T> || p.score.group > 1)
      start(partition_kernel<T, 8>, threads_of<T, 8>);
    else if constexpr (!is_16bit<T>)
      start(partition_kernel<T, 1>, threads_of<T, 1>);
  });
}

// Whether these are rows for long_rows_kernel, so many that one block or two each, with a multiprocessor to itself, are on two
// thirds of them at least.
bool are_long(const ClassScores& args, LongRowParams& p, const char* f) {
  p.score = score_params(args);
  if (element_bytes(args.k.dtype) != 2 || !p.score.vectors || p.score.group != 1 || p.score.tokens < 1024 || !has_clusters(f))
    return false;
  const std::int64_t batch = args.k.size[0], places = device_attribute(cudaDevAttrMultiProcessorCount, f);
  p.blocks = p.score.heads > 1 && 2 * batch <= places ? 2 : 1;
  p.heads = (p.score.heads + p.blocks - 1) / p.blocks;
  constexpr int of_selection = 6 * 1024;
  return p.blocks * batch <= places && 3 * p.blocks * batch >= 2 * places &&
         ring::shared_bytes(p) <= shared_memory_limit(f) - of_selection;
}

void run(LongRowParams p, const ClassScores& args, const Partition* select, const char* f, const Launch& to) {
  if (select != nullptr) {
    p.keep = static_cast<int>(select->keep), p.protect = static_cast<int>(select->protect);
    p.kept = select->kept, p.rest = select->rest;
  } else {
    p.scores_out = static_cast<float*>(args.scores);
  }
  const auto start = [&](auto kernel) {
    launch_clusters(f, kernel, grid(args.k.size[0] * p.blocks, f), ring::threads,
                    static_cast<std::size_t>(ring::shared_bytes(p)), static_cast<cudaStream_t>(to.stream), p,
                    static_cast<unsigned>(p.blocks));
  };
  args.q.dtype == DType::bfloat16 ? start(ring::long_rows_kernel<bf16>) : start(ring::long_rows_kernel<fp16>);
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
  if (LongRowParams p; args.k.size[0] > 0 && are_long(args, p, f)) return 0;
  const Parts parts(args, f);
  return ScoreWorkspace(args, parts, Plan(args, parts.heads), Plan(args.k.size[2])).bytes();
}

// With `select` the partition too, in one launch unless the heads of a row are shared out.
void score(const ClassScores& args, const Partition* select, const char* f, const Launch& to) {
  refuse_float64(args.q.dtype, f);
  const std::int64_t batch = args.k.size[0], tokens = args.k.size[2];
  if (batch * tokens == 0) return;
  if (LongRowParams p{}; are_long(args, p, f)) return run(p, args, select, f, to);
  const Parts parts(args, f);
  const Plan plan(args, parts.heads), last(tokens);
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
  return static_cast<std::size_t>(Plan(args.scores.size[1]).workspace * args.scores.size[0]) * 4;
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
  run(p, args.scores.dtype, args.scores.size[0], Plan(args.scores.size[1]), static_cast<float*>(to.workspace), f, to);
}

void class_scores(const ClassScores& args, const Launch& to) {
  score(args, nullptr, "class_scores", to);
}

void score_partition(const ScorePartition& args, const Launch& to) {
  score(args.score, &args.partition, "score_partition", to);
}

}  // namespace effcore::cuda::routing
