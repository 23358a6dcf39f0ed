// The arguments as kernels see them: typed, with strides, by value. attention.cu fills them in.
#pragma once
#include <cstdint>

#include "effcore/cuda/attention.h"

namespace effcore::cuda::attention {

constexpr int probs_tile = static_cast<int>(effcore::attention::probs_tile);
constexpr int decode_chunk = static_cast<int>(effcore::attention::decode_chunk);
constexpr int decode_heads = 16;  // query heads that a block of decoding serves: the rows of an operand

// [B, heads, tokens, dim] with the last dimension contiguous.
struct Tensor4 {
  void* data = nullptr;
  std::int64_t stride[3] = {};
  int columns = 0;
  bool aligned = false;  // every row starts at a multiple of 16 bytes and is one in width: 16-byte copies
  bool paired = false;   // every row starts at a multiple of two elements: two-element stores
};

// Sizes and visibility. Everything fits in 31 bits but offsets into tensors.
struct Shape {
  int batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  int group;  // query heads of a kv head
  bool causal;
  bool negative;     // scale < 0: kernels negate the scores and use -scale, so that maxima stay maxima
  float scale;       // |scale|
  float scale_log2;  // |scale| * log2(e), at least the smallest normal number (-inf * 0 would be NaN)
  const std::int32_t* lengths;
  std::int64_t lengths_stride;
  const std::int32_t* first_key;
  std::int64_t first_key_batch, first_key_query;
};

// Which blocks run together: heavy blocks first, and only so many heads at a time that their keys and values stay in L2.
struct Schedule {
  int blocks;   // of a head
  int heads;    // in all, batch included
  int section;  // heads that run together
};

struct ForwardParams {
  Shape shape;
  Schedule schedule;
  Tensor4 q, k, v, out;
  float* lse;         // written by the owner, read by consumers
  const void* probs;  // read by consumers of kept probabilities
  float* factors;     // of the probabilities that are kept or read
  int* ticket;        // memory for a counter that Hopper's kernels draw work from, or null
};

struct ProbsParams {
  Shape shape;
  Schedule schedule;
  Tensor4 q, k;
  const float* lse;
  void* probs;
  float* factors;  // of probs
};

struct DeltaParams {
  Shape shape;
  Tensor4 dout, out, dq;
  const float* consumers_delta;
  float* delta;
  const float* factors;  // of kept probabilities
  void* scaled;          // dout times these [batch * heads, queries, value_dim], or null
  int* turns;            // zeroed here, with the ticket behind them; null where no dq is wanted
  int turn_count;
  int block_q, block_k;
};

struct BackwardParams {
  Shape shape;
  Schedule schedule;
  Tensor4 q, k;
  const float* lse;
  const float* delta;
  const void* probs;
  const float* factors;  // of probs
  int layers;
  Tensor4 dout[max_layers], v[max_layers];
  Tensor4 scaled_dout;  // dout[0] times factors, where Hopper's kernels multiply it with kept probabilities
  Tensor4 dq, dk, dv;
  bool float_dk, float_dv;  // dk, dv in float32, whatever the inputs are
  Tensor4 dk_sum, dv_sum;   // float32, added to dk and dv before they are rounded; none: data is null
  float* dq_sums;           // [batch * heads, blocks of queries, tile in fragment order]
  void* scores;             // where dS, stored as P is, goes through device memory; else null
  int* turns;               // [batch * heads, blocks of queries]
  int* ticket;
};

struct DecodeParams {
  Shape shape;
  int splits, head_tiles;
  Tensor4 q, k, v, out;
  void* weights;
  float* scales;
  float* partial;      // [batch, heads, splits, value_dim]
  float2* statistics;  // [batch, heads, splits]: maximum (in units of log2) and sum; null: the splits are a cluster
};

// Tiles of blocks of rows that come before `block`, and tiles of that block (see effcore/attention.h).
inline __host__ __device__ std::int64_t probs_tiles_before(const Shape& s, std::int64_t block) {
  const std::int64_t all = (s.keys + probs_tile - 1) / probs_tile;
  if (!s.causal) return block * all;
  // Row block x ends with key keys - queries + 64 (x + 1), so it has max(0, x + 1 + shift) tiles.
  const std::int64_t over = static_cast<std::int64_t>(s.keys) - s.queries;
  const std::int64_t shift = over >= 0 ? (over + probs_tile - 1) / probs_tile : -(-over / probs_tile);
  if (shift >= 0) return block * shift + block * (block + 1) / 2;
  const std::int64_t n = block + shift;
  return n > 0 ? n * (n + 1) / 2 : 0;
}
inline __host__ __device__ int probs_tiles(const Shape& s, int block) {
  std::int64_t end = s.keys;
  if (s.causal) {
    const std::int64_t last = static_cast<std::int64_t>(block + 1) * probs_tile;
    end += (last < s.queries ? last : s.queries) - s.queries;
    end = end < 0 ? 0 : end;
  }
  return static_cast<int>((end + probs_tile - 1) / probs_tile);
}
inline __host__ __device__ std::int64_t probs_elements_of(const Shape& s) {
  const int blocks = (s.queries + probs_tile - 1) / probs_tile;
  return blocks == 0 ? 0 : (probs_tiles_before(s, blocks - 1) + probs_tiles(s, blocks - 1)) * probs_tile * probs_tile;
}
// P is what the tiles hold times these factors of its rows [batch * heads, queries], which stand behind the tiles of all heads:
// an owner that writes its tiles before it knows their rows' sums gives those here.
template <class T>
float* probs_factors(const Shape& s, const void* probs) {
  if (probs == nullptr) return nullptr;
  return reinterpret_cast<float*>(const_cast<T*>(static_cast<const T*>(probs)) +
                                  static_cast<std::int64_t>(s.batch) * s.heads * probs_elements_of(s));
}

}  // namespace effcore::cuda::attention
