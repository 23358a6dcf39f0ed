// Which tokens stay: the class token's scores and their partition, one block a batch row and one launch in all.
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
constexpr int shared_key_threads = 512;  // where heads share keys, a thread has the sums of 8 of them

struct PartitionParams {
  const void* scores;  // null: computed from q and k
  std::int64_t scores_stride;
  const void *q, *k;
  std::int64_t q_stride[2], k_stride[3];  // batch, head (, token)
  int tokens, heads, group, dim, lanes, head_chunk;
  bool vectors;
  float factor;       // scale · log2(e)
  float* scores_out;  // [B, tokens], or null
  float* workspace;   // or null: what is too large for shared memory
  std::int64_t workspace_stride;
  int keep, protect;
  std::int32_t *kept, *rest;  // or null
};

template <class T>
__device__ __forceinline__ Vector<T> load_keys(const T* row, int column, const PartitionParams& p) {
  if (p.vectors) return Vector<T>::from(load_once(row + column));
  Vector<T> x;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) x.x[i] = column + i < p.dim ? to_float(row[column + i]) : 0.0f;
  return x;
}

// scores[h - first][n] for the heads [first, first + count), of which q [count][padded] stands in shared memory.
template <class T, int batch>
__device__ __forceinline__ void score_heads(const PartitionParams& p, const float* q, int padded, int first, int count,
                                            float* scores) {
  constexpr int size = Vector<T>::size;
  const int lane = threadIdx.x % p.lanes, part = threadIdx.x / p.lanes, parts = blockDim.x / p.lanes;
  const T* const k = static_cast<const T*>(p.k) + blockIdx.x * p.k_stride[0];
  for (int g = first / p.group; g * p.group < first + count; ++g) {
    const int begin = max(first, g * p.group), end = min(first + count, (g + 1) * p.group);
    for (int h = begin; h < end; h += batch) {
      // All lanes of a warp take part in the shuffles, so they walk together.
#pragma unroll 2
      for (int n0 = 0; n0 < p.tokens; n0 += parts) {
        const int n = n0 + part;
        const T* row = k + g * p.k_stride[1] + static_cast<std::int64_t>(min(n, p.tokens - 1)) * p.k_stride[2];
        float sums[batch] = {};
        for (int column = lane * size; column < p.dim; column += p.lanes * size) {
          const auto x = load_keys(row, column, p);
#pragma unroll
          for (int j = 0; j < batch; ++j) {
            const float4* weights = reinterpret_cast<const float4*>(q + (min(h + j, end - 1) - first) * padded + column);
#pragma unroll
            for (int i = 0; i < size / 4; ++i) {
              const float4 w = weights[i];
              sums[j] = fmaf(x.x[4 * i], w.x, sums[j]), sums[j] = fmaf(x.x[4 * i + 1], w.y, sums[j]);
              sums[j] = fmaf(x.x[4 * i + 2], w.z, sums[j]), sums[j] = fmaf(x.x[4 * i + 3], w.w, sums[j]);
            }
          }
        }
        for (int offset = p.lanes / 2; offset > 0; offset /= 2)
#pragma unroll
          for (int j = 0; j < batch; ++j) sums[j] += __shfl_xor_sync(~0u, sums[j], offset);
        if (lane == 0 && n < p.tokens)
#pragma unroll
          for (int j = 0; j < batch; ++j)
            if (h + j < end) scores[static_cast<std::int64_t>(h + j - first) * p.tokens + n] = sums[j] * p.factor;
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

template <class T, int batch>
__global__ void __launch_bounds__(batch > 1 ? shared_key_threads : most_select_threads)
    partition_kernel(const __grid_constant__ PartitionParams p) {
  extern __shared__ __align__(16) float shared[];
  const std::int64_t b = blockIdx.x;
  // [queries of a chunk of heads][totals or keys][scores of the chunk]: the last two in the workspace where it is given
  const int padded = (p.dim + 7) / 8 * 8;
  float* const totals = p.workspace != nullptr ? p.workspace + b * p.workspace_stride
                                               : shared + (p.scores == nullptr ? p.head_chunk * padded : 0);
  auto* const keys = reinterpret_cast<std::uint32_t*>(totals);
  if (p.scores == nullptr) {
    float* const scores = totals + p.tokens;
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) totals[n] = 0.0f;
    for (int first = 0; first < p.heads; first += p.head_chunk) {
      const int count = min(p.head_chunk, p.heads - first);
      for (int i = threadIdx.x; i < count * padded; i += blockDim.x) {
        const int h = i / padded, column = i - h * padded;
        const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + (first + h) * p.q_stride[1];
        shared[i] = column < p.dim ? to_float(q[column]) : 0.0f;
      }
      __syncthreads();
      score_heads<T, batch>(p, shared, padded, first, count, scores);
      __syncthreads();
      for (int h = threadIdx.x / 32; h < count; h += blockDim.x / 32)
        softmax(scores + static_cast<std::int64_t>(h) * p.tokens, p.tokens, 1.0f / p.heads);
      __syncthreads();
      for (int n = threadIdx.x; n < p.tokens; n += blockDim.x)
        for (int h = 0; h < count; ++h) totals[n] += scores[static_cast<std::int64_t>(h) * p.tokens + n];
      __syncthreads();
    }
    if (p.scores_out != nullptr)
      for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) p.scores_out[b * p.tokens + n] = totals[n];
    if (p.kept == nullptr) return;
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) keys[n] = key_of(totals[n], n < p.protect);
  } else {
    const T* scores = static_cast<const T*>(p.scores) + b * p.scores_stride;
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) keys[n] = key_of(to_float(scores[n]), n < p.protect);
  }
  __syncthreads();
  select(keys, p.tokens, p.keep, p.kept + b * p.keep, p.rest + b * (p.tokens - p.keep));
}

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

int threads_for(const PartitionParams& p) {
  return p.tokens <= 512 || p.group > 1 ? shared_key_threads : most_select_threads;
}

std::size_t bytes_of(const Plan& plan, std::int64_t batch) {
  return static_cast<std::size_t>(plan.workspace * batch) * 4;
}

void use(const Plan& plan, PartitionParams& p, void* workspace, const char* function) {
  if (plan.shared > most_shared)
    throw std::invalid_argument(std::string("effcore.") + function + ": q has head dimension " + std::to_string(p.dim) +
                                ", more than CUDA kernels take");
  p.head_chunk = plan.head_chunk;
  p.workspace = plan.workspace > 0 ? static_cast<float*>(workspace) : nullptr;
  p.workspace_stride = plan.workspace;
}

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

void run(const PartitionParams& p, DType dtype, std::int64_t batch, const Plan& plan, const char* f, const Launch& to) {
  with_type(dtype, f, [&]<class T>(T) {
    launch(f, p.group > 1 ? partition_kernel<T, 8> : partition_kernel<T, 1>, grid(batch, f), threads_for(p),
           static_cast<std::size_t>(plan.shared), static_cast<cudaStream_t>(to.stream), p);
  });
}

Plan plan_of(const ClassScores& args) {
  return {args.k.size[2], args.q.size[1], args.k.size[3]};
}

}  // namespace

std::size_t workspace_bytes(const Partition& args) {
  return bytes_of(Plan(args.scores.size[1], 0, 0), args.scores.size[0]);
}
std::size_t workspace_bytes(const ClassScores& args) {
  return bytes_of(plan_of(args), args.k.size[0]);
}
std::size_t workspace_bytes(const ScorePartition& args) {
  return bytes_of(plan_of(args.score), args.score.k.size[0]);
}

void partition(const Partition& args, const Launch& to) {
  const char* f = "partition_tokens";
  refuse_float64(args.scores.dtype, f);
  if (args.scores.size[1] == 0) return;
  const Plan plan(args.scores.size[1], 0, 0);
  PartitionParams p{};
  p.scores = args.scores.data, p.scores_stride = args.scores.stride[0];
  p.tokens = static_cast<int>(args.scores.size[1]);
  p.keep = static_cast<int>(args.keep), p.protect = static_cast<int>(args.protect);
  p.kept = args.kept, p.rest = args.rest;
  use(plan, p, to.workspace, f);
  run(p, args.scores.dtype, args.scores.size[0], plan, f, to);
}

void class_scores(const ClassScores& args, const Launch& to) {
  const char* f = "class_scores";
  refuse_float64(args.q.dtype, f);
  if (args.k.size[2] == 0) return;
  const Plan plan = plan_of(args);
  PartitionParams p = score_params(args);
  p.scores_out = static_cast<float*>(args.scores);
  use(plan, p, to.workspace, f);
  run(p, args.q.dtype, args.k.size[0], plan, f, to);
}

void score_partition(const ScorePartition& args, const Launch& to) {
  const char* f = "score_partition";
  refuse_float64(args.score.q.dtype, f);
  if (args.score.k.size[2] == 0) return;
  const Plan plan = plan_of(args.score);
  PartitionParams p = score_params(args.score);
  p.keep = static_cast<int>(args.partition.keep), p.protect = static_cast<int>(args.partition.protect);
  p.kept = args.partition.kept, p.rest = args.partition.rest;
  use(plan, p, to.workspace, f);
  run(p, args.score.q.dtype, args.score.k.size[0], plan, f, to);
}

}  // namespace effcore::cuda::routing
