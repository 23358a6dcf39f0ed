// What a warpgroup does with a tile of scores in registers (layout: wgmma.cuh): mask, exponentials, row statistics; and how its
// output leaves.
#pragma once
#include "attention/visibility.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::hopper {

// Warpgroups issue their products in turn, so that while one multiplies the others take exponentials; or, without, as they
// come.
template <int Warpgroups, bool in_turn>
struct Order {
  std::uint32_t own;
  __device__ explicit Order(int warpgroup) : own(warpgroup) {
    if (own == Warpgroups - 1) pass_on();
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (in_turn) cutlass::arch::NamedBarrier::sync(256, own);
  }
  __device__ __forceinline__ void pass_on() const {
    if constexpr (in_turn) cutlass::arch::NamedBarrier::arrive(256, own == Warpgroups - 1 ? 0 : own + 1);
  }
};

// -inf where the key is not seen. `row` and `row + 8` are the thread's.
template <int Count>
__device__ __forceinline__ void mask(float (&score)[Count], const attention::Visibility& seen, int row, int queries, int key0) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = min(row + 8 * i, queries - 1), column = key0 + 2 * static_cast<int>(threadIdx.x % 4);
    const int begin = seen.begin(query) - column, end = seen.end(query) - column;
#pragma unroll
    for (int n = 0; n < Count / 4; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * n + e < begin || 8 * n + e >= end) score[4 * n + 2 * i + e] = -INFINITY;
  }
}

// The sum of row `row`, from its threads' parts. Scores that are all -inf have no softmax: NaN, as 0 / 0 would give.
__device__ __forceinline__ float sum_of_row(float part, const attention::Visibility& seen, int row, int queries) {
  const float total = row_sum(part);
  return total == 0.0f && row < queries && seen.sees_keys(row) ? NAN : total;
}

// Before they are stored: zeros in those of the thread's two rows that see no key (visibility.cuh).
template <int Count>
__device__ __forceinline__ void clear_rows(float (&out)[Count], bool first, bool second) {
  if (!__any_sync(~0u, first || second)) return;
#pragma unroll
  for (int n = 0; n < Count / 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < 2 ? first : second) out[4 * n + i] = 0.0f;
}
// The thread's are `row` and `row + 8` of [row0, last].
template <int Count>
__device__ __forceinline__ void clear_unseeing(float (&out)[Count], const attention::Visibility& seen, int row0, int last,
                                               int row) {
  if (!seen.all_see_keys(row0, last)) clear_rows(out, !seen.sees_keys(min(row, last)), !seen.sees_keys(min(row + 8, last)));
}

// Two rows of a thread. known_lse: P = 2^(scale_log2 S - lse log2e); otherwise online softmax.
template <bool known_lse>
struct Softmax {
  float scale_log2;
  float maximum[2], shift[2], sum[2], correction[2];  // known_lse: maximum is lse in units of log2

  __device__ explicit Softmax(float scale) : scale_log2(scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) maximum[i] = -INFINITY, shift[i] = sum[i] = 0.0f, correction[i] = 1.0f;
  }

  __device__ __forceinline__ void start(const float* lse, int row, int queries) {
#pragma unroll
    for (int i = 0; i < 2; ++i) set_lse(i, row + 8 * i < queries ? lse[row + 8 * i] : 0.0f);
  }
  __device__ __forceinline__ void set_lse(int i, float lse) {
    maximum[i] = lse == -INFINITY ? 0.0f : lse * 1.4426950408889634f;  // sees no key: 2^(-inf - 0) = 0
  }

  // Before the tile's exponentials.
  template <int Count>
  __device__ __forceinline__ void look_at(const float (&score)[Count]) {
    if constexpr (!known_lse) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = fmaxf(score[2 * i], score[2 * i + 1]);
#pragma unroll
        for (int n = 1; n < Count / 4; ++n) highest = fmaxf(highest, fmaxf(score[4 * n + 2 * i], score[4 * n + 2 * i + 1]));
        highest = fmaxf(maximum[i], row_max(highest));
        shift[i] = highest == -INFINITY ? 0.0f : highest * scale_log2;
        correction[i] = exp2_approx(maximum[i] * scale_log2 - shift[i]);
        maximum[i] = highest;
        sum[i] *= correction[i];
      }
    }
  }
  // Scores of the blocks of 8 keys from .. to - 1 become probabilities (up to the sum).
  template <int from, int to, int Count>
  __device__ __forceinline__ void probabilities(float (&score)[Count]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = from; n < to; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[4 * n + 2 * i + e];
          x = exp2_approx(fmaf(x, scale_log2, -(known_lse ? maximum[i] : shift[i])));
          if constexpr (!known_lse) sum[i] += x;
        }
    }
  }

  template <int Count>
  __device__ __forceinline__ void rescale(float (&out)[Count]) const {
    // Where no maximum of the warp's rows has grown, and soon none does, there is nothing to do.
    if (!known_lse && __any_sync(~0u, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Count / 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[4 * n + i] *= correction[i / 2];
    }
  }

  // The factors 1 / sum, and the owner's lse. True: any row fits.
  __device__ __forceinline__ bool finish(float (&factor)[2], float* lse, const attention::Visibility& seen, int row,
                                         int queries) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = sum_of_row(sum[i], seen, row + 8 * i, queries);
      factor[i] = total == 0.0f ? 0.0f : 1.0f / total;
      const float x = total == 0.0f ? -INFINITY : maximum[i] * scale_log2 * 0.6931471805599453f + logf(total);
      if (row + 8 * i < queries && threadIdx.x % 4 == 0) lse[row + 8 * i] = x;
      maximum[i] = row + 8 * i < queries ? x : INFINITY;
    }
    return true;
  }

  // Behind `finish`: what gives the rows' own probabilities, and zeros below the last query.
  __device__ __forceinline__ Softmax<true> normalised() const {
    Softmax<true> known(scale_log2);
#pragma unroll
    for (int i = 0; i < 2; ++i) known.set_lse(i, maximum[i]);
    return known;
  }
};

// Two rows of a thread, whose exponentials are relative to a fixed number: the maximum of the first tile in which the row sees
// a key. No tile but that one needs its maximum, and no sum is ever rescaled. Where a later score is so much larger that the
// row leaves the range, `finish` says so, and the row has to be computed with a running maximum.
struct AnchoredSoftmax {
  // Of a row's sum. With values up to 1e26 the outputs stay in the range of float32, too.
  static constexpr float limit = 0x1p40f;

  float scale_log2;
  float anchor[2], sum[2];  // anchor: in units of log2; -inf: no key seen yet
  bool searching = true;    // some row of the warp has no anchor

  __device__ AnchoredSoftmax(float scale, int row, int queries) : scale_log2(scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      anchor[i] = row + 8 * i < queries ? -INFINITY : INFINITY, sum[i] = 0.0f;  // zeros below the last
  }

  // Before the tile's exponentials.
  template <int Count>
  __device__ __forceinline__ void look_at(const float (&score)[Count]) {
    if (searching) find_anchors(score);
  }
  // Scores of the blocks of 8 keys from .. to - 1 become probabilities up to the sum.
  template <int from, int to, int Count>
  __device__ __forceinline__ void probabilities(float (&score)[Count]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float shift = anchor[i] == -INFINITY ? 0.0f : anchor[i];
#pragma unroll
      for (int n = from; n < to; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[4 * n + 2 * i + e];
          x = exp2_approx(fmaf(x, scale_log2, -shift));
          sum[i] += x;
        }
    }
  }

  template <int Count>
  __device__ __forceinline__ void rescale(float (&)[Count]) const {}

  // The factors 1 / sum, and the owner's lse; whether the warp's rows are in range.
  __device__ __forceinline__ bool finish(float (&factor)[2], float* lse, const attention::Visibility& seen, int row,
                                         int queries) const {
    bool fits = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = sum_of_row(sum[i], seen, row + 8 * i, queries);
      factor[i] = total == 0.0f ? 0.0f : 1.0f / total;
      const float x = total == 0.0f ? -INFINITY : anchor[i] * 0.6931471805599453f + logf(total);
      if (row + 8 * i < queries && threadIdx.x % 4 == 0) lse[row + 8 * i] = x;
      fits = fits && total < limit;
    }
    return __all_sync(~0u, fits);
  }

 private:
  template <int Count>
  __device__ __forceinline__ void find_anchors(const float (&score)[Count]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = fmaxf(score[2 * i], score[2 * i + 1]);
#pragma unroll
      for (int n = 1; n < Count / 4; ++n) highest = fmaxf(highest, fmaxf(score[4 * n + 2 * i], score[4 * n + 2 * i + 1]));
      highest = row_max(highest);
      if (anchor[i] == -INFINITY) anchor[i] = highest * scale_log2;
    }
    searching = __any_sync(~0u, anchor[0] == -INFINITY || anchor[1] == -INFINITY);
  }
};

// Probabilities as the A operand of the next product.
template <class T, int Count>
__device__ __forceinline__ void pack(std::uint32_t (&probs)[Count / 8][4], const float (&score)[Count]) {
#pragma unroll
  for (int j = 0; j < Count / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) probs[j][i] = cuda::pack<T>(score[8 * j + 2 * i], score[8 * j + 2 * i + 1]);
}

// Two rounded elements as floats. By their bits where that is all: with the library's conversion ptxas permutes halves that are
// also an operand of a product, two instructions more for each register.
template <class T>
__device__ __forceinline__ float2 widen(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>)
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  else
    return unpack<T>(pair);
}

// Adds up what `pack` has rounded, of the thread's two rows.
template <class T, int Blocks>
__device__ __forceinline__ void add_up(float (&sum)[2], const std::uint32_t (&probs)[Blocks][4]) {
#pragma unroll
  for (int j = 0; j < Blocks; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen<T>(probs[j][i]);
      sum[i % 2] += pair.x + pair.y;
    }
}

// The four threads of a row exchange pairs of columns: thread t gets the pairs of all four of x[t], eight neighbouring columns.
__device__ __forceinline__ uint4 gather_columns(const std::uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  std::uint32_t y[4], z[4];
  // Neighbours swap so that each has two pairs of two of the blocks, then the halves of the quad do.
  const std::uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  y[0] = odd ? a : x[0], y[1] = odd ? x[1] : a;  // block odd
  y[2] = odd ? b : x[2], y[3] = odd ? x[3] : b;  // block 2 + odd
  const std::uint32_t c = __shfl_xor_sync(~0u, high ? y[0] : y[2], 2), d = __shfl_xor_sync(~0u, high ? y[1] : y[3], 2);
  z[0] = high ? c : y[0], z[1] = high ? d : y[1];
  z[2] = high ? y[2] : c, z[3] = high ? y[3] : d;
  return make_uint4(z[0], z[1], z[2], z[3]);
}

// Rows `row` and `row + 8` of the thread, those before `rows`, times their factors to device memory: 16 bytes a thread, from
// column `column0` on.
template <class T, int D>
__device__ __forceinline__ void store_rows(const attention::Tensor4& to, int batch, int head, int row, int rows, int column0,
                                           const float (&out)[D / 2], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T* const at = attention::row_of<T>(to, batch, head, min(row + 8 * i, rows - 1));
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
      std::uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        x[j] = cuda::pack<T>(out[4 * (n + j) + 2 * i] * factor[i], out[4 * (n + j) + 2 * i + 1] * factor[i]);
      const uint4 eight = gather_columns(x);
      const int column = column0 + 8 * (n + static_cast<int>(threadIdx.x % 4));
      if (row + 8 * i < rows && column < to.columns) *reinterpret_cast<uint4*>(at + column) = eight;
    }
  }
}

}  // namespace effcore::cuda::hopper
