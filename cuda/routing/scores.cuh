// The class token's scores by one block: scores[h][n] = factor · q_h · k_n for some heads, and what their softmax needs.
//
// Bound: each key is read once, for up to 8 heads that share it, and the reading must not stop. A warp takes 16 tokens at a
// time and 128 bytes of each, and asks for its next ones in a ring of its own, so that while a head's softmax is added up the
// keys of the next head are on their way.
//
//   lane (r, c) = (lane / 4, lane % 4) holds the 16 bytes c and c + 4 of those 128, of tokens r and r + 8
//
// 16-bit keys go to the tensor cores: the tokens are the rows of A and up to 8 queries the columns of B (one query: all columns
// alike, as the tensor cores have nothing else to do). A dot product does not depend on the order of its terms, so a lane's 16
// bytes are its share of two products as they come, and keys and queries need no rearrangement. float32 runs on the FMA units,
// without TF32's rounding, and ends in the same layout.
#pragma once
#include <cmath>

#include "common/fragment.cuh"
#include "routing/rows.cuh"

namespace effcore::cuda::routing {

struct ScoreParams {
  const void *q, *k;
  std::int64_t q_stride[2], k_stride[3];  // batch, head (, token)
  int tokens, heads, group, dim;
  int chunk;         // heads whose scores stand in memory together
  bool vectors;      // k's rows are aligned
  float factor;      // scale · log2(e)
  int query_stride;  // of the queries in shared memory
};

constexpr int tile_tokens = 16, line_bytes = 128, step_bytes = tile_tokens * line_bytes;
template <class T>
constexpr int line_columns = line_bytes / static_cast<int>(sizeof(T));

// Elements of a query in shared memory: whole lines, with zeros behind its end; 16 bits: 64 bytes more, so that the eight lanes
// that read at once (two queries) find different banks.
inline int query_stride(std::int64_t dim, int element_bytes) {
  const std::int64_t bytes = (dim * element_bytes + line_bytes - 1) / line_bytes * line_bytes + (element_bytes == 2 ? 64 : 0);
  return static_cast<int>(bytes / element_bytes);
}

template <class T>
__device__ __forceinline__ void load_queries(const ScoreParams& p, std::int64_t b, int first, int count, T* queries) {
  for (int i = threadIdx.x; i < count * p.query_stride; i += blockDim.x) {
    const int h = i / p.query_stride, column = i - h * p.query_stride;
    const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + (first + h) * p.q_stride[1];
    queries[i] = column < p.dim ? q[column] : from_float<T>(0.0f);
  }
}

// ---- reading

// 16 bytes to shared memory without a register in between; `bytes` of them, zeros behind.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes)
               : "memory");
}

// The heads from h on that share keys and are in one chunk of the heads [first, last), up to `batch`.
template <int batch>
__device__ __forceinline__ int end_of_sharing(const ScoreParams& p, int h, int first, int last) {
  if constexpr (batch == 1) return h + 1;
  return min(min(first + ((h - first) / p.chunk + 1) * p.chunk, last), min((h / p.group + 1) * p.group, h + batch));
}

// A warp's way through the keys of the heads [first, last): tiles of 16 tokens in turn with the other warps, from head to head
// without a stop; a tile's lines one after the other. Of each line's eight 16-byte pieces a lane fetches one, of every fourth
// token.
template <class T, int batch>
class Walk {
 public:
  __device__ __forceinline__ Walk(const ScoreParams& p, const T* k, int first, int last)
      : k_(k), first_(first), last_(last), h_(first), tile_(threadIdx.x / 32), column_(0) {
    settle(p);
  }
  __device__ __forceinline__ bool done() const { return h_ >= last_; }

  __device__ __forceinline__ void next(const ScoreParams& p) {
    column_ += line_columns<T>, from_ += line_columns<T>;
    if (column_ < p.dim) return;
    const int warps = blockDim.x / 32;
    tile_ += warps, from_ += warps * tile_tokens * p.k_stride[2] - column_, column_ = 0;
    if (tile_ * tile_tokens >= p.tokens) settle(p);
  }

  // Asks for this step's keys. In shared memory a line's pieces change places with those four on in every other token, so that
  // the eight lanes that read at once (two tokens) find different banks.
  __device__ __forceinline__ void fetch(const ScoreParams& p, char* slot) const {
    constexpr int size = Vector<T>::size, copies = step_bytes / 16 / 32;
    const int t = threadIdx.x % 32 / 8, piece = threadIdx.x % 8;
    const int tokens = p.tokens - tile_ * tile_tokens - t, columns = p.dim - column_ - piece * size;  // that are left
    const std::int64_t four = 4 * p.k_stride[2];
    char* const to = slot + t * line_bytes + (piece ^ (t & 1) << 2) * 16;
    if (p.vectors) {
#pragma unroll
      for (int i = 0; i < copies; ++i)
        copy_async(to + 4 * i * line_bytes, from_ + i * four, columns > 0 && 4 * i < tokens ? 16 : 0);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < copies; ++i) {
      T x[size];
#pragma unroll
      for (int u = 0; u < size; ++u) x[u] = u < columns && 4 * i < tokens ? from_[i * four + u] : from_float<T>(0.0f);
      *reinterpret_cast<uint4*>(to + 4 * i * line_bytes) = *reinterpret_cast<const uint4*>(x);
    }
  }

 private:
  const T *k_, *from_;  // the batch row's keys; this lane's next ones
  int first_, last_, h_, tile_, column_;

  __device__ __forceinline__ void settle(const ScoreParams& p) {
    const int tiles = (p.tokens + tile_tokens - 1) / tile_tokens;
    for (; tile_ >= tiles && h_ < last_; tile_ -= tiles) h_ = end_of_sharing<batch>(p, h_, first_, last_);
    from_ = k_ + (batch == 1 ? h_ : h_ / p.group) * p.k_stride[1] +
            (tile_ * tile_tokens + threadIdx.x % 32 / 8) * p.k_stride[2] + threadIdx.x % 8 * Vector<T>::size;
  }
};

// ---- multiplying

// q · k of 16 tokens with up to 8 queries, `batch` where they are fewer.
template <class T, int batch>
struct Products {
  float sums[is_16bit<T> ? 4 : 2 * batch];

  __device__ __forceinline__ Products() {
    for (float& sum : sums) sum = 0.0f;
  }
  // A step's keys with `count` queries.
  __device__ __forceinline__ void add(const ScoreParams& p, const uint4 (&x)[2], const uint4 (&y)[2], const T* queries,
                                      int count) {
    const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const T* const piece = queries + (c + 4 * u) * Vector<T>::size;
      if constexpr (is_16bit<T>) {
        const uint4 q = *reinterpret_cast<const uint4*>(piece + min(r, count - 1) * p.query_stride);
        mma_16x8x16<T>(sums, {x[u].x, y[u].x, x[u].y, y[u].y}, q.x, q.y);
        mma_16x8x16<T>(sums, {x[u].z, y[u].z, x[u].w, y[u].w}, q.z, q.w);
      } else {
        const auto low = Vector<T>::from(x[u]), high = Vector<T>::from(y[u]);
#pragma unroll
        for (int j = 0; j < batch; ++j) {  // a piece by itself first: fewer roundings one upon the other
          const auto q = Vector<T>::from(*reinterpret_cast<const uint4*>(piece + min(j, count - 1) * p.query_stride));
          float of_low = 0.0f, of_high = 0.0f;
#pragma unroll
          for (int i = 0; i < Vector<T>::size; ++i)
            of_low = fmaf(low.x[i], q.x[i], of_low), of_high = fmaf(high.x[i], q.x[i], of_high);
          sums[j] += of_low, sums[batch + j] += of_high;
        }
      }
    }
  }
  // [token r or r + 8][head 2 c or 2 c + 1]; one head alone: in every lane.
  __device__ __forceinline__ void get(float (&out)[2][2]) {
    const int c = threadIdx.x % 4;
    if constexpr (is_16bit<T>) {
      out[0][0] = sums[0], out[0][1] = sums[1], out[1][0] = sums[2], out[1][1] = sums[3];
    } else {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float* const own = sums + t * batch;
        if constexpr (batch == 1) {
          for (int offset = 1; offset < 4; offset *= 2) own[0] += __shfl_xor_sync(~0u, own[0], offset);
          out[t][0] = own[0], out[t][1] = 0.0f;
        } else {  // each step halves the heads that a lane still carries
#pragma unroll
          for (int m = batch / 2, offset = 2; offset > 0; m /= 2, offset /= 2)
#pragma unroll
            for (int j = 0; j < m; ++j) {
              const float mine = c & offset ? own[j + m] : own[j], other = c & offset ? own[j] : own[j + m];
              own[j] = mine + __shfl_xor_sync(~0u, other, offset);
            }
          out[t][0] = own[0], out[t][1] = own[1];
        }
      }
    }
  }
};

// ---- softmax, in powers of two

// The greatest score, and the sum of 2^(score - greatest).
struct Softmax {
  float top = -INFINITY, sum = 0.0f;

  // Of no scores, or of nothing but -inf: nothing.
  __device__ __forceinline__ static float base(float top) { return top == -INFINITY ? 0.0f : top; }
  __device__ __forceinline__ void add(float a, float b) {
    const float greater = fmaxf(top, fmaxf(a, b)), from = base(greater);
    sum = sum * exp2_approx(top - from) + exp2_approx(a - from) + exp2_approx(b - from);
    top = greater;
  }
  // Of all lanes that differ in the bits from `first` to `last` of their number.
  __device__ __forceinline__ void add_lanes(int first, int last) {
    float greatest = top;
    for (int offset = first; offset <= last; offset *= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, offset));
    sum *= exp2f(top - base(greatest)), top = greatest;
    for (int offset = first; offset <= last; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  }
};

// Where a block's scores stand: of a chunk of heads at a time.
template <class T>
struct ScoreSpace {
  char* ring;              // [warps][stages][step_bytes]
  T* queries;              // [chunk][query_stride]
  Softmax* of_warps;       // [chunk][warps]
  float2* statistics;      // [chunk]: the greatest score, and a probability's factor
  float *totals, *scores;  // [tokens], [chunk][tokens]
};

// totals[n] = weight · sum over the heads [begin, end) of softmax_n(scores[h]). A thread adds up its own tokens, head after
// head, so that the sums have one order. Behind the caller's next barrier they are complete.
template <class T, int batch, int stages>
__device__ __forceinline__ void score_heads(const ScoreParams& p, std::int64_t b, int begin, int end, float weight,
                                            const ScoreSpace<T>& space) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int tiles = (p.tokens + tile_tokens - 1) / tile_tokens;
  char* const ring = space.ring + warp * stages * step_bytes;
  Walk<T, batch> ahead(p, static_cast<const T*>(p.k) + b * p.k_stride[0], begin, end);
  int slot = 0;
  const auto ask = [&] {
    if (!ahead.done()) ahead.fetch(p, ring + slot * step_bytes), ahead.next(p);
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (++slot == stages) slot = 0;
  };
  for (int s = 0; s < stages; ++s) ask();
  int tile = warp;
  for (int first = begin; first < end; first += p.chunk) {
    const int count = min(p.chunk, end - first);
    load_queries(p, b, first, count, space.queries);
    __syncthreads();
    for (int h = 0; h < count; tile -= tiles) {
      const int sharing = end_of_sharing<batch>(p, first + h, begin, end) - first - h;
      const T* const queries = space.queries + h * p.query_stride;
      float* const row = space.scores + static_cast<std::int64_t>(h + 2 * c) * p.tokens;
      Softmax softmax[2];
      for (; tile < tiles; tile += warps) {
        Products<T, batch> products;
        for (int column = 0; column < p.dim; column += line_columns<T>) {
          asm volatile("cp.async.wait_group %0;" ::"n"(stages - 1) : "memory");
          __syncwarp();
          uint4 x[2], y[2];
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const char* const from = ring + slot * step_bytes + r * line_bytes + (c + 4 * u ^ (r & 1) << 2) * 16;
            x[u] = *reinterpret_cast<const uint4*>(from), y[u] = *reinterpret_cast<const uint4*>(from + 8 * line_bytes);
          }
          __syncwarp();
          ask();
          products.add(p, x, y, queries + column, sharing);
        }
        float scores[2][2];
        products.get(scores);
        const int n = tile * tile_tokens + r;
#pragma unroll
        for (int j = 0; j < (batch == 1 ? 1 : 2); ++j) {
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const bool there = n + 8 * t < p.tokens;
            scores[t][j] = there ? scores[t][j] * p.factor : -INFINITY;
            if (there && 2 * c + j < sharing) row[j * p.tokens + n + 8 * t] = scores[t][j];
          }
          softmax[j].add(scores[0][j], scores[1][j]);
        }
      }
#pragma unroll
      for (int j = 0; j < (batch == 1 ? 1 : 2); ++j) {
        softmax[j].add_lanes(4, 16);
        if (r == 0 && 2 * c + j < sharing) space.of_warps[(h + 2 * c + j) * warps + warp] = softmax[j];
      }
      h += sharing;
    }
    __syncthreads();
    for (int h = warp; h < count; h += warps) {
      Softmax all = lane < warps ? space.of_warps[h * warps + lane] : Softmax{};
      all.add_lanes(1, 16);
      if (lane == 0) space.statistics[h] = {all.top, weight / all.sum};
    }
    __syncthreads();
    for (int n = threadIdx.x; n < p.tokens; n += blockDim.x) {
      float total = first == begin ? 0.0f : space.totals[n];
      for (int h = 0; h < count; ++h)
        total +=
            exp2f(space.scores[static_cast<std::int64_t>(h) * p.tokens + n] - space.statistics[h].x) * space.statistics[h].y;
      space.totals[n] = total;
    }
    __syncthreads();
  }
}

}  // namespace effcore::cuda::routing
