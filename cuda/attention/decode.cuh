// Decoding: one new token a row against a padded cache, O = softmax(scale q K^T) V, or O = P V from another layer's weights.
//
// Bound: K and V of the visible keys are read once from device memory (V alone, and the weights, from probabilities). The query
// heads of a kv head are packed as the rows of one 16-row operand, so the cache is read once for all of them. The visible
// chunks of decode_chunk keys are dealt out evenly over `splits` blocks, by the lengths found on the device. Where those are
// one block, or a cluster of blocks, they put their results together themselves (decode_combine.cuh); else combine_kernel does.
//
// Shared memory: Q [16 x D]; a ring of `stages` tiles [keys x D], through which K and V of a chunk pass one after the other;
// all but one of them are on their way. Of each tile a warp owns keys / 4: its scores stay in registers, are rounded and
// multiply the same warp's keys of V; the warps' outputs are added up once, at the end.
//
// The weights of a chunk are exp(score - maximum of the chunk and head), and the products with V are of these rounded weights,
// scaled in float32: a consumer that reads the weights gets the same product.
#pragma once
#include "attention/decode_combine.cuh"
#include "attention/visibility.cuh"

namespace effcore::cuda::attention {

template <class T, int D, bool from_probs, bool compact>
struct DecodeTiles {
  static constexpr int warps = 4, threads = 32 * warps, heads = decode_heads;
  static constexpr int size = static_cast<int>(sizeof(T));
  // Three tiles of 32 KiB, or four of 16 beside weights: two blocks an SM, with 48 KiB and more each on their way. `compact` is
  // for GPUs with 99 KiB of shared memory a block.
  static constexpr int wanted = (from_probs || compact ? 16384 : 32768) / (D * size);
  static constexpr int keys = wanted >= 64 ? wanted : 64;
  static constexpr int stages = keys * D * size <= 16384 ? 4 : keys * D * size <= 32768 && !compact ? 3 : 2;
  static constexpr int tiles = decode_chunk / keys;  // of a chunk
  static constexpr int warp_keys = keys / warps;     // of a tile
  static constexpr int tile_bytes = keys * D * size, q_bytes = heads * D * size;
  static constexpr int output_bytes = warps * heads * D * 4;  // at the end, in the ring
  // Weights [16 x chunk] and their scales come with the first tile of V of their chunk: as many stages as chunks that the ring
  // can touch.
  static constexpr int weights_bytes = heads * decode_chunk * size,
                       weights_stages = from_probs ? (stages - 1 + tiles - 1) / tiles + 1 : 0;
  static constexpr int weights_at = (from_probs ? 0 : q_bytes) + stages * tile_bytes;
  static constexpr int scales_at = weights_at + weights_stages * weights_bytes;
  static constexpr int maxima_at = scales_at + weights_stages * heads * 4, sums_at = maxima_at + 2 * warps * heads * 4;
  static constexpr int shared_bytes = sums_at + warps * heads * 4;
  static_assert(output_bytes <= stages * tile_bytes);
};

template <class T, int D, bool from_probs, bool compact>
__global__ void __launch_bounds__(DecodeTiles<T, D, from_probs, compact>::threads)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  using Tiles = DecodeTiles<T, D, from_probs, compact>;
  constexpr int threads = Tiles::threads, warp_keys = Tiles::warp_keys, tiles = Tiles::tiles;
  constexpr float infinity = INFINITY;
  extern __shared__ __align__(1024) char shared[];
  char* const ring = shared + (from_probs ? 0 : Tiles::q_bytes);
  auto* const maxima = reinterpret_cast<float (*)[Tiles::warps][Tiles::heads]>(shared + Tiles::maxima_at);  // two chunks'
  auto* const sums = reinterpret_cast<float (*)[Tiles::heads]>(shared + Tiles::sums_at);

  const Shape& s = p.shape;
  int number = blockIdx.x;
  const int split = number % p.splits;
  number /= p.splits;
  const int head_tile = number % p.head_tiles;
  number /= p.head_tiles;
  const int kv_head = number % s.kv_heads, batch = number / s.kv_heads;
  const int head0 = kv_head * s.group + head_tile * Tiles::heads, heads = min(Tiles::heads, s.group - head_tile * Tiles::heads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Visibility seen(s, batch);
  const int begin = seen.begin(0), end = seen.length;
  const int all_chunks = (s.keys + decode_chunk - 1) / decode_chunk;
  const int first_chunk = begin / decode_chunk, chunks = begin < end ? (end - 1) / decode_chunk + 1 - first_chunk : 0;
  const int chunk0 = first_chunk + static_cast<int>(static_cast<std::int64_t>(chunks) * split / p.splits);
  const int chunk1 = first_chunk + static_cast<int>(static_cast<std::int64_t>(chunks) * (split + 1) / p.splits);
  const Matrix<T> k = matrix<T>(p.k, batch, kv_head), v = matrix<T>(p.v, batch, kv_head);
  const std::int64_t row0 = static_cast<std::int64_t>(batch) * s.heads + head0;  // of weights, scales and partial results
  T* const weights = static_cast<T*>(p.weights);
  const bool clustered = p.statistics == nullptr;

  // Chunks that nobody sees: weights 0, and a scale of 0, into which combine_kernel turns a maximum of -inf.
  if (!from_probs && weights != nullptr) {
    for (int chunk = split; chunk < all_chunks; chunk += p.splits) {
      if (chunk >= first_chunk && chunk < first_chunk + chunks) continue;
      const int key0 = chunk * decode_chunk, width = min(decode_chunk, s.keys - key0);
      for (int i = threadIdx.x; i < heads * width; i += threads)
        weights[(row0 + i / width) * s.keys + key0 + i % width] = from_float<T>(0.0f);
      if (threadIdx.x < heads) p.scales[(row0 + threadIdx.x) * all_chunks + chunk] = clustered ? 0.0f : -infinity;
    }
  }

  // The sequence of tiles: of each chunk first those of K, then those of V.
  constexpr int items_per_chunk = from_probs ? tiles : 2 * tiles;
  const int items = (chunk1 - chunk0) * items_per_chunk;
  const auto load = [&](int item) {
    if (item < items) {
      const int part = item % items_per_chunk,
                key0 = (chunk0 + item / items_per_chunk) * decode_chunk + part % tiles * Tiles::keys;
      const bool is_k = !from_probs && part < tiles;
      load_tile<Tiles::keys, threads>(Tile<T, D>(ring + item % Tiles::stages * Tiles::tile_bytes), is_k ? k : v, key0, begin,
                                      end);
      if constexpr (from_probs) {
        if (part == 0) {
          const int chunk = chunk0 + item / tiles, stage = item / tiles % Tiles::weights_stages;
          const T* from = weights + row0 * s.keys + key0;
          const bool aligned = s.keys % Tile<T, D>::chunk == 0 && reinterpret_cast<std::uintptr_t>(weights) % 16 == 0;
          load_tile<Tiles::heads, threads>(Tile<T, decode_chunk>(shared + Tiles::weights_at + stage * Tiles::weights_bytes),
                                           Matrix<T>{from, s.keys, min(s.keys - key0, decode_chunk), aligned}, 0, 0, heads);
          if (threadIdx.x < Tiles::heads)
            async_copy_4(shared_address(shared + Tiles::scales_at + (stage * Tiles::heads + threadIdx.x) * 4),
                         p.scales + (threadIdx.x < heads ? (row0 + threadIdx.x) * all_chunks + chunk : 0), threadIdx.x < heads);
        }
      }
    }
    async_commit();
  };
  // Waits for the next tile of the sequence and starts loading into the one that was left before it.
  int item = 0;
  const auto next_tile = [&] {
    async_wait<Tiles::stages - 2>();
    __syncthreads();
    load(item + Tiles::stages - 1);
    return Tile<T, D>(ring + item++ % Tiles::stages * Tiles::tile_bytes);
  };

  const Tile<T, D> q_tile(shared);
  if constexpr (!from_probs) {  // row h of the operand is query head head0 + h; Q has one token
    Matrix<T> q = matrix<T>(p.q, batch, head0);
    q.stride = p.q.stride[1];
    load_tile<Tiles::heads, threads>(q_tile, q, 0, 0, heads);
  }
#pragma unroll
  for (int i = 0; i < Tiles::stages - 1; ++i) load(i);

  float out[D / 8][4], maximum[2] = {-infinity, -infinity}, sum[2] = {0.0f, 0.0f};  // maximum in units of log2
  clear(out);
  const float scale_log2 = s.negative ? -s.scale_log2 : s.scale_log2;
  for (int chunk = chunk0; chunk < chunk1; ++chunk) {
    const int chunk_key = chunk * decode_chunk;
    float score[from_probs ? 2 : decode_chunk / 32][4];  // tile by tile, this warp's keys; then the weights
    float factor[2];                                     // of this chunk's product with V
    const auto key_of = [&](int n, int e) {              // column 2 * (lane % 4) + e of accumulator n
      return chunk_key + n / (warp_keys / 8) * Tiles::keys + warp * warp_keys + n % (warp_keys / 8) * 8 + 2 * (lane % 4) + e;
    };
    if constexpr (!from_probs) {
      clear(score);
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        const Tile<T, D> k_tile = next_tile();
#pragma unroll 4
        for (int d = 0; d < D; d += 16) {
          const Operand<T> a = q_tile.a(0, d);
#pragma unroll
          for (int n = 0; n < warp_keys / 16; ++n) {
            const int at = t * (warp_keys / 8) + 2 * n;
            multiply_add(score[at], score[at + 1], a, k_tile.b(warp * warp_keys + 16 * n, d));
          }
        }
      }
      float (&chunk_maxima)[Tiles::warps][Tiles::heads] = maxima[(chunk - chunk0) % 2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = -infinity;
#pragma unroll
        for (int n = 0; n < decode_chunk / 32; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = score[n][2 * i + e];
            const int key = key_of(n, e);
            x = key >= begin && key < end ? x * scale_log2 : -infinity;
            highest = fmaxf(highest, x);
          }
        highest = row_max(highest);
        if (lane % 4 == 0) chunk_maxima[warp][lane / 4 + 8 * i] = highest;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = lane / 4 + 8 * i;
        float highest = chunk_maxima[0][head];
#pragma unroll
        for (int w = 1; w < Tiles::warps; ++w) highest = fmaxf(highest, chunk_maxima[w][head]);
        const float shift = highest == -infinity ? 0.0f : highest, before = maximum[i];
        maximum[i] = fmaxf(before, highest);
        const float rescale = before == -infinity ? 0.0f : exp2_approx(before - maximum[i]);
        factor[i] = highest == -infinity ? 0.0f : exp2_approx(highest - maximum[i]);
        float chunk_sum = 0.0f;
#pragma unroll
        for (int n = 0; n < decode_chunk / 32; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) chunk_sum += score[n][2 * i + e] = exp2_approx(score[n][2 * i + e] - shift);
        sum[i] = sum[i] * rescale + chunk_sum * factor[i];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[n][2 * i] *= rescale, out[n][2 * i + 1] *= rescale;
        if (weights != nullptr && head < heads) {
          if (warp == 0 && lane % 4 == 0) p.scales[(row0 + head) * all_chunks + chunk] = highest;
#pragma unroll
          for (int n = 0; n < decode_chunk / 32; ++n)
            store_pair(weights + (row0 + head) * s.keys, key_of(n, 0), s.keys, s.keys % 2 == 0, score[n][2 * i],
                       score[n][2 * i + 1]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      const Tile<T, D> v_tile = next_tile();
      const int stage = (chunk - chunk0) % (from_probs ? Tiles::weights_stages : 1);
      const Tile<T, decode_chunk> w_tile(shared + Tiles::weights_at + stage * Tiles::weights_bytes);
      if (from_probs && t == 0) {
        const float* scales = reinterpret_cast<const float*>(shared + Tiles::scales_at) + stage * Tiles::heads;
        factor[0] = scales[lane / 4], factor[1] = scales[lane / 4 + 8];
      }
      Operand<T> a[warp_keys / 16];
#pragma unroll
      for (int j = 0; j < warp_keys / 16; ++j) {
        const int at = t * (warp_keys / 8) + 2 * j;
        if constexpr (from_probs)
          a[j] = w_tile.a(0, t * Tiles::keys + warp * warp_keys + 16 * j);
        else
          a[j] = as_operand<T>(score[at], score[at + 1]);
      }
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        float product[2][4];
        clear(product);
#pragma unroll
        for (int j = 0; j < warp_keys / 16; ++j)
          multiply_add(product[0], product[1], a[j], v_tile.b_transposed(warp * warp_keys + 16 * j, 16 * n));
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[2 * n + side][i] = fmaf(product[side][i], factor[i / 2], out[2 * n + side][i]);
      }
    }
  }

  // Over the warps, in order.
  let_next_kernel_begin();  // combine_kernel, where there is one
  async_wait<0>();
  __syncthreads();
  float* const outputs = reinterpret_cast<float*>(ring);  // [warp][head][D]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = lane / 4 + 8 * i;
    const float warp_sum = row_sum(sum[i]);
    if (lane % 4 == 0) sums[warp][head] = warp_sum, maxima[0][warp][head] = maximum[i];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<float2*>(outputs + (warp * Tiles::heads + head) * D + 8 * n + 2 * (lane % 4)) =
          make_float2(out[n][2 * i], out[n][2 * i + 1]);
  }
  __syncthreads();
  if (threadIdx.x < heads) {
    const int head = threadIdx.x;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < Tiles::warps; ++w) total += sums[w][head];
    sums[0][head] = total;
    if (!from_probs && !clustered) p.statistics[(row0 + head) * p.splits + split] = make_float2(maxima[0][0][head], total);
  }
  for (int i = threadIdx.x; i < heads * s.value_dim; i += threads) {
    const int head = i / s.value_dim, column = i % s.value_dim;
    float* const output = outputs + head * D + column;
    float x = 0.0f;
#pragma unroll
    for (int w = 0; w < Tiles::warps; ++w) x += output[w * Tiles::heads * D];
    if (clustered)
      *output = x;
    else
      p.partial[((row0 + head) * p.splits + split) * s.value_dim + column] = x;
  }
  if (!clustered) return;
  float* const factors = outputs + Tiles::heads * D;  // [splits][heads], where the second warp's outputs were
  combine_cluster<T, D, from_probs>(p, outputs, maxima[0][0], sums[0], factors, batch, head0, heads, split, chunk0, chunk1);
}

}  // namespace effcore::cuda::attention
