// Which tokens stay: the class token's scores and their partition. One block a batch row and one launch in all, unless there
// are so few rows that their heads are shared out among blocks; then a second launch adds up and selects.
//
//   scores[n] = 1/heads · sum over h of softmax_n(scale · q_h · k_g(h),n)
//
// Bound: k is read once. For some heads at a time the scores stand in shared memory (in the workspace where a row has too many
// tokens); then each warp takes the softmax of a head, and each thread adds up its tokens' probabilities, head after head, so
// that the sums have one order. A key row is read by `lanes` neighbouring lanes, 16 bytes each, for up to 8 heads that share it
// at once.
#include <cmath>

#include "effcore/cuda/routing.h"
#include "routing/rows.cuh"
#include "routing/select.cuh"

namespace effcore::cuda::routing {
namespace {

// Shared memory that every GPU since sm_80 gives a block.
constexpr std::int64_t most_shared = 90 * 1024;
constexpr int tokens_at_once = 4;
// Where heads share keys a thread has the sums of `batch` heads: more registers, fewer threads. Either way two blocks a
// multiprocessor.
template <int batch>
constexpr int threads_of = batch > 1 ? 256 : 512;

struct PartitionParams {
  // One of three: scores, the class token's q and all k, or totals of parts of the heads.
  const void* scores;
  std::int64_t scores_stride;
  const void *q, *k;
  float* partial;  // [B, parts, tokens]: written with k, read without
  int parts;
  int splits, split_heads;                // parts of the heads in this launch, each of so many
  std::int64_t q_stride[2], k_stride[3];  // batch, head (, token)
  int tokens, heads, group, dim, lanes, head_chunk;
  bool vectors;
  float factor;       // scale · log2(e)
  float* scores_out;  // [B, tokens], or null
  float* workspace;   // or null: what is too large for shared memory
  std::int64_t workspace_stride;
  bool selects;
  int keep, protect;
  std::int32_t *kept, *rest;
};

template <class T>
__device__ __forceinline__ Vector<T> load_keys(const T* row, int column, const PartitionParams& p) {
  if (p.vectors) return Vector<T>::from(load_once(row + column));
  Vector<T> x;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) x.x[i] = column + i < p.dim ? to_float(row[column + i]) : 0.0f;
  return x;
}

// Adds up `batch` sums over `lanes` neighbouring lanes. Where there are lanes enough, each step halves the sums that a lane
// still carries (9 shuffles instead of 40 for 8 sums over a warp), and sum j ends up in the lanes from j * lanes / batch on.
// Returns the first of the sums that this lane has; `have` of them.
template <int batch>
__device__ __forceinline__ int add_lanes(float (&sums)[batch], int lanes, int lane, int& have) {
  int offset = lanes / 2;
  have = batch;
  if (batch == 1 || lanes < batch) {
    for (; offset > 0; offset /= 2)
#pragma unroll
      for (int j = 0; j < batch; ++j) sums[j] += __shfl_xor_sync(~0u, sums[j], offset);
    return 0;
  }
#pragma unroll
  for (int m = batch / 2; m > 0; m /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int j = 0; j < m; ++j) {
      const float mine = upper ? sums[j + m] : sums[j], other = upper ? sums[j] : sums[j + m];
      sums[j] = mine + __shfl_xor_sync(~0u, other, offset);
    }
  }
  for (; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
  have = 1;
  return lane / (lanes / batch);
}

// scores[h - first][n] for the heads [first, first + count), of which q [count][padded] stands in shared memory. A group of
// lanes takes `tokens_at_once` tokens together: so many loads in flight, and each weight read once for all of them.
template <class T, int batch>
__device__ __forceinline__ void score_heads(const PartitionParams& p, std::int64_t b, const float* q, int padded, int first,
                                            int count, float* scores) {
  constexpr int size = Vector<T>::size;
  const int lane = threadIdx.x % p.lanes, part = threadIdx.x / p.lanes, parts = blockDim.x / p.lanes;
  const T* const k = static_cast<const T*>(p.k) + b * p.k_stride[0];
  for (int g = first / p.group; g * p.group < first + count; ++g) {
    const int begin = max(first, g * p.group), end = min(first + count, (g + 1) * p.group);
    for (int h = begin; h < end; h += batch) {
      // All lanes of a warp take part in the shuffles, so they walk together.
      for (int n0 = part; n0 - part < p.tokens; n0 += parts * tokens_at_once) {
        const T* rows[tokens_at_once];
        float sums[tokens_at_once][batch] = {};
#pragma unroll
        for (int u = 0; u < tokens_at_once; ++u)
          rows[u] = k + g * p.k_stride[1] + static_cast<std::int64_t>(min(n0 + u * parts, p.tokens - 1)) * p.k_stride[2];
        for (int column = lane * size; column < p.dim; column += p.lanes * size) {
          Vector<T> x[tokens_at_once];
#pragma unroll
          for (int u = 0; u < tokens_at_once; ++u) x[u] = load_keys(rows[u], column, p);
#pragma unroll
          for (int j = 0; j < batch; ++j) {
            const float4* weights = reinterpret_cast<const float4*>(q + (min(h + j, end - 1) - first) * padded + column);
#pragma unroll
            for (int i = 0; i < size / 4; ++i) {
              const float4 w = weights[i];
#pragma unroll
              for (int u = 0; u < tokens_at_once; ++u) {
                float& sum = sums[u][j];
                sum = fmaf(x[u].x[4 * i], w.x, sum), sum = fmaf(x[u].x[4 * i + 1], w.y, sum);
                sum = fmaf(x[u].x[4 * i + 2], w.z, sum), sum = fmaf(x[u].x[4 * i + 3], w.w, sum);
              }
            }
          }
        }
#pragma unroll
        for (int u = 0; u < tokens_at_once; ++u) {
          int have;
          const int from = add_lanes(sums[u], p.lanes, lane, have), n = n0 + u * parts;
          const bool writes = have == 1 && batch > 1 ? lane % (p.lanes / batch) == 0 : lane == 0;
          if (!writes || n >= p.tokens) continue;
#pragma unroll
          for (int j = 0; j < batch; ++j)
            if (j < have && h + from + j < end)
              scores[static_cast<std::int64_t>(h + from + j - first) * p.tokens + n] = sums[u][j] * p.factor;
        }
      }
    }
  }
}

// A warp makes probabilities of a head's scores; weight is 1 / heads.
__device__ __forceinline__ void softmax(float* scores, int tokens, float weight) {
  const int lane = threadIdx.x % 32;
  float top = -INFINITY;
  for (int n = lane; n < tokens; n += 32) top = fmaxf(top, scores[n]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  float sum = 0.0f;
  for (int n = lane; n < tokens; n += 32) sum += scores[n] = exp2f(scores[n] - top);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const float share = weight / sum;
  for (int n = lane; n < tokens; n += 32) scores[n] *= share;
}

// A block for each batch row, or (p.splits > 1) for each part of its heads; the totals of the parts then go to `partial`, and a
// second launch adds them up and selects.
template <class T, int batch>
__global__ void __launch_bounds__(threads_of<batch>, 2) partition_kernel(const __grid_constant__ PartitionParams p) {
  extern __shared__ __align__(16) float shared[];
  const std::int64_t b = blockIdx.x / p.splits;
  const int part = blockIdx.x - static_cast<int>(b) * p.splits;
  // [queries of a chunk of heads][totals or keys][scores of the chunk]: the last two in the workspace where it is given
  const int padded = (p.dim + 7) / 8 * 8;
  float* const totals = p.workspace != nullptr ? p.workspace + blockIdx.x * p.workspace_stride
                                               : shared + (p.k != nullptr ? p.head_chunk * padded : 0);
  auto* const keys = reinterpret_cast<std::uint32_t*>(totals);
  if (p.k != nullptr) {
    float* const scores = totals + p.tokens;
    const int begin = part * p.split_heads, end = min(begin + p.split_heads, p.heads);
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) totals[n] = 0.0f;
    for (int first = begin; first < end; first += p.head_chunk) {
      const int count = min(p.head_chunk, end - first);
      for (int i = threadIdx.x; i < count * padded; i += blockDim.x) {
        const int h = i / padded, column = i - h * padded;
        const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + (first + h) * p.q_stride[1];
        shared[i] = column < p.dim ? to_float(q[column]) : 0.0f;
      }
      __syncthreads();
      score_heads<T, batch>(p, b, shared, padded, first, count, scores);
      __syncthreads();
      for (int h = threadIdx.x / 32; h < count; h += blockDim.x / 32)
        softmax(scores + static_cast<std::int64_t>(h) * p.tokens, p.tokens, 1.0f / p.heads);
      __syncthreads();
      for (int n = threadIdx.x; n < p.tokens; n += blockDim.x)
        for (int h = 0; h < count; ++h) totals[n] += scores[static_cast<std::int64_t>(h) * p.tokens + n];
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
  select(keys, p.tokens, p.keep, p.kept + b * p.keep, p.rest + b * (p.tokens - p.keep));
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

  Plan(std::int64_t tokens, std::int64_t heads, std::int64_t dim) {
    const std::int64_t padded = (dim + 7) / 8 * 8;
    const auto bytes = [&](std::int64_t chunk) { return (chunk * padded + tokens + chunk * tokens) * 4; };
    if (heads == 0) {  // keys alone
      if (tokens * 4 <= most_shared)
        shared = tokens * 4;
      else
        workspace = tokens;
      return;
    }
    for (head_chunk = static_cast<int>(heads); head_chunk > 1 && bytes(head_chunk) > most_shared;) --head_chunk;
    shared = bytes(head_chunk);
    if (shared <= most_shared) return;
    head_chunk = static_cast<int>(std::clamp<std::int64_t>(most_shared / (padded * 4), 1, std::min<std::int64_t>(heads, 8)));
    shared = head_chunk * padded * 4;
    workspace = tokens * (1 + head_chunk);
  }
};

PartitionParams score_params(const ClassScores& args) {
  const TensorView &q = args.q, &k = args.k;
  PartitionParams p{};
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
  return p;
}

void run(PartitionParams p, DType dtype, std::int64_t batch, const Plan& plan, float* workspace, const char* f,
         const Launch& to) {
  if (plan.shared > most_shared)
    throw std::invalid_argument(std::string("effcore.") + f + ": q has head dimension " + std::to_string(p.dim) +
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
    if (p.group > 1)
      start(partition_kernel<T, 8>, threads_of<8>);
    else
      start(partition_kernel<T, 1>, threads_of<1>);
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
  const std::int64_t tokens = args.k.size[2];
  return ScoreWorkspace(args, parts, Plan(tokens, parts.heads, args.k.size[3]), Plan(tokens, 0, 0)).bytes();
}

// With `select` the partition too, in one launch unless the heads of a row are shared out.
void score(const ClassScores& args, const Partition* select, const char* f, const Launch& to) {
  refuse_float64(args.q.dtype, f);
  const std::int64_t batch = args.k.size[0], tokens = args.k.size[2];
  if (batch * tokens == 0) return;
  const Parts parts(args, f);
  const Plan plan(tokens, parts.heads, args.k.size[3]), last(tokens, 0, 0);
  const ScoreWorkspace space(args, parts, plan, last);
  auto* const workspace = static_cast<float*>(to.workspace);
  PartitionParams p = score_params(args);
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
  p.q = p.k = nullptr;
  p.parts = parts.count, p.splits = 1, p.group = 1;
  p.selects = select != nullptr;
  run(p, DType::float32, batch, last, workspace + space.partial, f, to);
}

}  // namespace

std::size_t workspace_bytes(const Partition& args) {
  return static_cast<std::size_t>(Plan(args.scores.size[1], 0, 0).workspace * args.scores.size[0]) * 4;
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
  p.group = 1, p.selects = true;
  p.keep = static_cast<int>(args.keep), p.protect = static_cast<int>(args.protect);
  p.kept = args.kept, p.rest = args.rest;
  run(p, args.scores.dtype, args.scores.size[0], Plan(args.scores.size[1], 0, 0), static_cast<float*>(to.workspace), f, to);
}

void class_scores(const ClassScores& args, const Launch& to) {
  score(args, nullptr, "class_scores", to);
}

void score_partition(const ScorePartition& args, const Launch& to) {
  score(args.score, &args.partition, "score_partition", to);
}

}  // namespace effcore::cuda::routing
