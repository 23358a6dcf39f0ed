// The class token's scores and the partition of rows whose many keys are what takes time: 16 bits, aligned, each head its own.
//
// Bound: k is read once, and the reading must not stop. A block has a multiprocessor to itself; each of its warps takes 16
// tokens at a time and 128 bytes of each, and asks for its next ones in a ring of its own, so that while a head's softmax is
// added up the keys of the next head are on their way. Of a row's heads a cluster of two blocks takes half each where there are
// places for that; the first block adds up and selects, in the same launch.
//
//   lane (r, c) = (lane / 4, lane % 4) multiplies the 16 bytes c and c + 4 of those 128, of tokens r and r + 8, as score_tile
//   does
#pragma once
#include "common/cluster.cuh"
#include "routing/scores.cuh"
#include "routing/select.cuh"

namespace effcore::cuda::routing {

struct LongRowParams {
  ScoreParams score;
  int blocks, heads;  // of a row; of a block
  float* scores_out;  // [B, tokens], or null: the partition
  int keep, protect;
  std::int32_t *kept, *rest;
};

namespace ring {

constexpr int threads = 512, warps = threads / 32, stages = 5;
constexpr int tile_tokens = 16, line_bytes = 128, step_bytes = tile_tokens * line_bytes, line_columns = line_bytes / 2;

// Dynamic shared memory: the rings, queries, a head's scores, and the row's totals.
inline std::int64_t shared_bytes(const LongRowParams& p) {
  return warps * stages * step_bytes + std::int64_t{p.heads} * p.score.query_stride * 2 + std::int64_t{p.score.tokens} * 8;
}

// 16 bytes to shared memory without a register in between, or zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

// A warp's way through the keys of some heads: every 16th tile of each, a tile's lines one after the other. Of each line's
// eight 16-byte pieces a lane fetches one, of every fourth token.
template <class T>
class Walk {
 public:
  __device__ __forceinline__ Walk(const ScoreParams& p, const T* k, int heads)
      : k_(k + threadIdx.x % 32 / 8 * p.k_stride[2] + threadIdx.x % 8 * 8), left_(heads), tile_(threadIdx.x / 32), column_(0) {}

  // Asks for the next step's keys, if there are more. In shared memory a line's pieces change places with those four on in
  // every other token, so that the eight lanes that read at once (two tokens) find different banks.
  __device__ __forceinline__ void fetch(const ScoreParams& p, char* slot) {
    const int tiles = (p.tokens + tile_tokens - 1) / tile_tokens;
    if (left_ > 0 && tile_ < tiles) {
      const int t = threadIdx.x % 32 / 8, piece = threadIdx.x % 8, n = tile_ * tile_tokens;
      const T* const from = k_ + n * p.k_stride[2] + column_;
      char* const to = slot + t * line_bytes + (piece ^ (t & 1) << 2) * 16;
#pragma unroll
      for (int i = 0; i < tile_tokens; i += 4)
        copy_async(to + i * line_bytes, from + i * p.k_stride[2], n + t + i < p.tokens && column_ + piece * 8 < p.dim);
      column_ += line_columns;
      if (column_ >= p.dim) column_ = 0, tile_ += warps;
      if (tile_ >= tiles) tile_ = threadIdx.x / 32, k_ += p.k_stride[1], --left_;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

 private:
  const T* k_;  // this lane's piece of the head's first keys
  int left_, tile_, column_;
};

// The greatest of some scores, and the sum of 2^(score - greatest).
struct Softmax {
  float top = -INFINITY, sum = 0.0f;

  // Of no scores, or of nothing but -inf: 0.
  __device__ __forceinline__ static float base(float top) { return top == -INFINITY ? 0.0f : top; }
  __device__ __forceinline__ void add(float a, float b) {
    const float greater = fmaxf(top, fmaxf(a, b)), from = base(greater);
    sum = sum * exp2_approx(top - from) + exp2_approx(a - from) + exp2_approx(b - from);
    top = greater;
  }
  // Of the lanes that differ in the bits from `first` to `last` of their numbers.
  __device__ __forceinline__ void add_lanes(int first, int last) {
    float greatest = top;
    for (int offset = first; offset <= last; offset *= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, offset));
    sum *= exp2f(top - base(greatest)), top = greatest;
    for (int offset = first; offset <= last; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  }
};

// A cluster of p.blocks blocks a batch row.
template <class T>
__global__ void __launch_bounds__(threads, 1) long_rows_kernel(const __grid_constant__ LongRowParams p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Softmax of_warps[2][warps];
  const ScoreParams& s = p.score;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int tiles = (s.tokens + tile_tokens - 1) / tile_tokens;
  const std::int64_t b = blockIdx.x / p.blocks;
  const int block = blockIdx.x % p.blocks, first = block * p.heads, heads = min(p.heads, s.heads - first);
  char* const slots = shared + warp * stages * step_bytes;
  T* const queries = reinterpret_cast<T*>(shared + warps * stages * step_bytes);
  float* const scores = reinterpret_cast<float*>(queries + p.heads * s.query_stride);
  float* const totals = scores + s.tokens;

  Walk<T> ahead(s, static_cast<const T*>(s.k) + b * s.k_stride[0] + first * s.k_stride[1], heads);
  for (int i = 0; i < stages; ++i) ahead.fetch(s, slots + i * step_bytes);
  load_queries(s, b, first, heads, queries);
  __syncthreads();
  int slot = 0;
  for (int h = 0; h < heads; ++h) {
    // A warp's tokens are its own until the last head is done: their scores and totals need no barrier of the block.
    Softmax softmax;
    for (int tile = warp; tile < tiles; tile += warps) {
      float sums[4] = {};
      for (int column = 0; column < s.dim; column += line_columns) {
        asm volatile("cp.async.wait_group %0;" ::"n"(stages - 1) : "memory");
        __syncwarp();
        uint4 x[2], y[2];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const char* const from = slots + slot * step_bytes + r * line_bytes + ((c + 4 * u) ^ (r & 1) << 2) * 16;
          x[u] = *reinterpret_cast<const uint4*>(from), y[u] = *reinterpret_cast<const uint4*>(from + 8 * line_bytes);
        }
        __syncwarp();
        ahead.fetch(s, slots + slot * step_bytes);
        if (++slot == stages) slot = 0;
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const uint4 q = *reinterpret_cast<const uint4*>(queries + h * s.query_stride + column + 8 * (c + 4 * u));
          mma_16x8x16<T>(sums, {x[u].x, y[u].x, x[u].y, y[u].y}, q.x, q.y);
          mma_16x8x16<T>(sums, {x[u].z, y[u].z, x[u].w, y[u].w}, q.z, q.w);
        }
      }
      // All columns are alike: lane c = 0 keeps token r, lane c = 1 token r + 8.
      const int n = tile * tile_tokens + r;
      const float low = n < s.tokens ? sums[0] * s.factor : -INFINITY, high = n + 8 < s.tokens ? sums[2] * s.factor : -INFINITY;
      if (c == 0 && n < s.tokens) scores[n] = low;
      if (c == 1 && n + 8 < s.tokens) scores[n + 8] = high;
      softmax.add(low, high);
    }
    softmax.add_lanes(4, 16);
    if (lane == 0) of_warps[h % 2][warp] = softmax;
    __syncthreads();
    Softmax all = lane < warps ? of_warps[h % 2][lane] : Softmax{};
    all.add_lanes(1, 16);
    const float weight = 1.0f / static_cast<float>(s.heads) / all.sum;
    for (int tile = warp + lane / 16 * warps; tile < tiles; tile += 2 * warps)
      if (const int n = tile * tile_tokens + lane % 16; n < s.tokens)
        totals[n] = (h == 0 ? 0.0f : totals[n]) + exp2f(scores[n] - all.top) * weight;
    __syncwarp();
  }
  cluster_sync();
  auto* const keys = reinterpret_cast<std::uint32_t*>(scores);
  if (block == 0) {
    constexpr int at_once = 4;  // tokens whose totals of the other blocks are on their way together
    for (int begin = threadIdx.x; begin < s.tokens; begin += at_once * threads) {
      float sums[at_once] = {};
      for (int i = 0; i < p.blocks; ++i)
#pragma unroll
        for (int u = 0; u < at_once; ++u)
          if (const int n = begin + u * threads; n < s.tokens) sums[u] += load_of_block(totals + n, i);
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        const int n = begin + u * threads;
        if (n >= s.tokens) break;
        if (p.scores_out != nullptr)
          p.scores_out[b * s.tokens + n] = sums[u];
        else
          keys[n] = key_of(sums[u], n < p.protect);
      }
    }
  }
  cluster_sync();  // the others' shared memory is there until it is read
  if (block == 0 && p.scores_out == nullptr)
    select(keys, s.tokens, p.keep, p.protect, p.kept + b * p.keep, p.rest + b * (s.tokens - p.keep));
}

}  // namespace ring

}  // namespace effcore::cuda::routing
