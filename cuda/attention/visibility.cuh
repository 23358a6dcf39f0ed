// Which keys a query sees: first_key <= j < end, read from the device and clamped to what exists.
#pragma once
#include "attention/params.h"
#include "common/tile.cuh"

namespace effcore::cuda::attention {

__device__ __forceinline__ int clamp_to(int x, int low, int high) {
  return min(max(x, low), high);
}

// One row of the batch.
struct Visibility {
  const std::int32_t* first_key;  // of query 0, or null
  std::int64_t first_key_step;
  int keys, length, offset;  // causal: query i ends before key i + offset + 1
  bool causal;

  __device__ Visibility(const Shape& s, int batch)
      : first_key(s.first_key != nullptr ? s.first_key + batch * s.first_key_batch : nullptr),
        first_key_step(s.first_key_query),
        keys(s.keys),
        length(s.lengths != nullptr ? clamp_to(s.lengths[batch * s.lengths_stride], 0, s.keys) : s.keys),
        offset(length - s.queries),
        causal(s.causal) {}

  __device__ int begin(int query) const {
    return first_key != nullptr ? clamp_to(first_key[query * first_key_step], 0, keys) : 0;
  }
  __device__ int end(int query) const { return causal ? clamp_to(query + offset + 1, 0, length) : length; }

  // A row that sees no key is stored as zeros: its sums may hold NaN, the product of its P = 0 with a NaN that other rows see.
  __device__ bool sees_keys(int query) const { return begin(query) < end(query); }
  // Whether each of queries [first, last] does, at less cost: both ends grow with the query. False may be wrong.
  __device__ bool all_see_keys(int first, int last) const { return begin(last) < end(first); }
};

// The keys that queries [first, last] may see; both bounds grow with the query.
struct KeyRange {
  int begin, end;
  __device__ KeyRange(const Visibility& seen, int first, int last) : begin(seen.begin(first)), end(seen.end(last)) {}
  __device__ bool empty() const { return begin >= end; }
};

// Block number -> (block of the head, head with batch), sections of heads one after the other, heavy blocks first.
struct Work {
  int block, head;
  __device__ Work(const Schedule& s, int number, bool heavy_last) {
    const int section = number / (s.section * s.blocks);
    const int heads = min(s.section, s.heads - section * s.section);
    const int inside = number - section * s.section * s.blocks;
    block = inside / heads;
    head = section * s.section + inside % heads;
    if (heavy_last) block = s.blocks - 1 - block;
  }
};

template <class T>
__device__ __forceinline__ Matrix<T> matrix(const Tensor4& t, int batch, int head) {
  return {static_cast<const T*>(t.data) + batch * t.stride[0] + head * t.stride[1], t.stride[2], t.columns, t.aligned};
}
template <class T>
__device__ __forceinline__ T* row_of(const Tensor4& t, int batch, int head, int row) {
  return static_cast<T*>(t.data) + batch * t.stride[0] + head * t.stride[1] + row * t.stride[2];
}

// Starts copying keys [key0, key0 + Columns) of the kept probabilities of queries [query0, query0 + Rows) of one head.
// Tiles that are not stored become zeros.
template <int Rows, int Threads, class T, int Columns>
__device__ __forceinline__ void load_probs(const Tile<T, Columns>& tile, const T* head_probs, const Shape& s, int query0,
                                           int key0) {
  constexpr int chunk = Tile<T, Columns>::chunk, chunks = Columns / chunk, step = Threads / chunks;
  static_assert(Threads % chunks == 0 && (Rows % step == 0 || Rows < step) && Columns % chunk == 0);
  const int column = threadIdx.x % chunks * chunk, first = threadIdx.x / chunks;
  const int key = key0 + column, across = key / probs_tile;
  const std::uint32_t base = shared_address(tile.data);
#pragma unroll
  for (int r = 0; r < Rows; r += step) {
    const int query = query0 + first + r, block = query / probs_tile;
    const bool valid = query < s.queries && across < probs_tiles(s, block);
    const T* from = head_probs;
    if (valid)
      from += (probs_tiles_before(s, block) + across) * (probs_tile * probs_tile) + query % probs_tile * probs_tile +
              key % probs_tile;
    if (Rows >= step || first < Rows) async_copy_16(base + tile.offset(first + r, column), from, valid);
  }
}

}  // namespace effcore::cuda::attention
