// A gather and the normalization of what was gathered, and its gradient (formulas: effcore/routing.h).
//
// Bound: memory. Forward: a row is read once, into registers, and written twice. Backward: a row of dx is written once, from
// the gathered row and its two gradients; then the gathered rows and dnormed are read again for the sums over rows: a block
// takes 32 columns of some rows, and a second launch adds the blocks' sums up in order. A warp takes a row, or two short ones
// forward. Rows that are not aligned, or too long for the registers, are read element by element, from the first-level cache
// after the first time.
#include "effcore/cuda/routing.h"
#include "routing/inverse.cuh"
#include "routing/rows.cuh"

namespace effcore::cuda::routing {
namespace {

constexpr int threads = 128, warps = threads / 32;

// Over so many neighbouring lanes, which all come here.
template <int lanes = 32>
__device__ __forceinline__ float lane_sum(float x) {
  const unsigned mask = lanes == 32 ? ~0u : ((1u << lanes % 32) - 1) << (threadIdx.x % 32 / lanes * lanes);
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  return x;
}

struct Weight {
  const void* data;
  bool is_float;

  template <class T>
  __device__ __forceinline__ float at(int c) const {
    return is_float ? static_cast<const float*>(data)[c] : to_float(static_cast<const T*>(data)[c]);
  }
  template <class T>
  __device__ __forceinline__ Vector<T> vector(int c) const {
    if (!is_float) return Vector<T>::from(*reinterpret_cast<const uint4*>(static_cast<const T*>(data) + c));
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < Vector<T>::size; i += 4) {
      const float4 w = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + c + i);
      v.x[i] = w.x, v.x[i + 1] = w.y, v.x[i + 2] = w.z, v.x[i + 3] = w.w;
    }
    return v;
  }
};

struct NormParams {
  Rows x, tokens, normed;
  List index;
  Weight weight, bias;
  float *mean, *rstd;  // [B, size]
  std::int64_t items;
  int size, total, channels;
  float eps;
  bool rms;
};

// A row in the registers of some lanes: `vectors` pieces of 16 bytes each, or (vectors == 0) element by element from memory.
template <class T, int vectors, int lanes = 32>
struct LaneRow {
  static constexpr int size = Vector<T>::size;
  Vector<T> x[vectors > 0 ? vectors : 1];
  const T* row;

  __device__ __forceinline__ void load(const void* from, int channels, int lane) {
    row = static_cast<const T*>(from);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int c = (v * lanes + lane) * size;
      x[v] = Vector<T>::from(c < channels ? *reinterpret_cast<const uint4*>(row + c) : uint4{});
    }
  }
  // body(channel, value) for each element of this lane
  template <class Body>
  __device__ __forceinline__ void each(int channels, int lane, const Body& body) {
    if constexpr (vectors == 0) {
      for (int c = lane; c < channels; c += lanes) body(c, to_float(row[c]));
    } else {
#pragma unroll
      for (int v = 0; v < vectors; ++v)
        if ((v * lanes + lane) * size < channels)
#pragma unroll
          for (int i = 0; i < size; ++i) body((v * lanes + lane) * size + i, x[v].x[i]);
    }
  }
  // to[channel] = value(channel, x)
  template <class Value>
  __device__ __forceinline__ void store(void* to, int channels, int lane, const Value& value) {
    if constexpr (vectors == 0) {
      for (int c = lane; c < channels; c += lanes) static_cast<T*>(to)[c] = from_float<T>(value(c, to_float(row[c])));
    } else {
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        const int c = (v * lanes + lane) * size;
        if (c >= channels) continue;
        Vector<T> out;
#pragma unroll
        for (int i = 0; i < size; ++i) out.x[i] = value(c + i, x[v].x[i]);
        *reinterpret_cast<uint4*>(static_cast<T*>(to) + c) = out.bits();
      }
    }
  }
};

template <class T, int vectors, int lanes>
__global__ void __launch_bounds__(threads) norm_kernel(const __grid_constant__ NormParams p) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (threads / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  if (item >= p.items) return;
  const std::int64_t b = item / p.size, i = item - b * p.size;
  const int token = min(max(p.index(b, i), 0), p.total - 1);  // a bad index reads another token, and no other memory
  LaneRow<T, vectors, lanes> row;
  row.load(p.x(b, token), p.channels, lane);
  float mean = 0.0f, squares = 0.0f;
  if (!p.rms) {
    row.each(p.channels, lane, [&](int, float x) { mean += x; });
    mean = lane_sum<lanes>(mean) / p.channels;
  }
  row.each(p.channels, lane, [&](int, float x) { squares = fmaf(x - mean, x - mean, squares); });
  const float rstd = rsqrtf(lane_sum<lanes>(squares) / p.channels + p.eps);
  if (lane == 0) {
    if (!p.rms) p.mean[item] = mean;
    p.rstd[item] = rstd;
  }
  row.store(p.tokens(b, i), p.channels, lane, [&](int, float x) { return x; });
  if constexpr (vectors > 0) {
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int c = (v * lanes + lane) * Vector<T>::size;
      if (c >= p.channels) continue;
      const auto weight = p.weight.vector<T>(c);
      Vector<T> bias{};
      if (p.bias.data != nullptr) bias = p.bias.vector<T>(c);
#pragma unroll
      for (int e = 0; e < Vector<T>::size; ++e) row.x[v].x[e] = fmaf((row.x[v].x[e] - mean) * rstd, weight.x[e], bias.x[e]);
    }
    row.store(p.normed(b, i), p.channels, lane, [](int, float x) { return x; });
  } else {
    row.store(p.normed(b, i), p.channels, lane, [&](int c, float x) {
      const float y = (x - mean) * rstd * p.weight.at<T>(c);
      return p.bias.data != nullptr ? y + p.bias.at<T>(c) : y;
    });
  }
}

struct NormBackwardParams {
  Rows tokens, dtokens, dnormed, dx;
  Weight weight;
  const float *mean, *rstd;
  const std::int32_t *first, *next;
  std::int64_t items;  // rows of dx
  int size, total, channels;
  bool rms;
};

template <class T, int vectors>
__global__ void __launch_bounds__(threads) norm_backward_kernel(const __grid_constant__ NormBackwardParams p) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (item >= p.items) return;
  const std::int64_t b = item / p.total;
  char* const to = p.dx(b, item - b * p.total);
  LaneRow<T, vectors> x, g, direct;
  std::int32_t i = p.first[item];
  if (i < 0) {
    x.load(to, 0, lane);
    if constexpr (vectors == 0)
      for (int c = lane; c < p.channels; c += 32) reinterpret_cast<T*>(to)[c] = from_float<T>(0.0f);
    else
      x.store(to, p.channels, lane, [](int, float) { return 0.0f; });
    return;
  }
  const std::int32_t* next = p.next + b * p.size;
  // A repeated token's row is one row with the sum of the gradients: the norm's gradient is linear in them, and the statistics
  // are equal.
  const std::int64_t place = b * p.size + i;
  const float mean = p.rms ? 0.0f : p.mean[place], rstd = p.rstd[place];
  x.load(p.tokens(b, i), p.channels, lane);
  g.load(p.dnormed(b, i), p.channels, lane);
  if (p.dtokens.data != nullptr) direct.load(p.dtokens(b, i), p.channels, lane);
  const bool repeated = next[i] >= 0;
  const auto others = [&](const Rows& rows, int c) {
    float sum = 0.0f;
    for (std::int32_t j = next[i]; j >= 0; j = next[j]) sum += to_float(reinterpret_cast<const T*>(rows(b, j))[c]);
    return sum;
  };
  if constexpr (vectors == 0) {
    const auto gradient = [&](int c) {
      return (to_float(g.row[c]) + (repeated ? others(p.dnormed, c) : 0.0f)) * p.weight.at<T>(c);
    };
    float level = 0.0f, along = 0.0f;
    x.each(p.channels, lane, [&](int c, float value) {
      const float s = gradient(c);
      level += s, along = fmaf(s, (value - mean) * rstd, along);
    });
    level = p.rms ? 0.0f : lane_sum(level) / p.channels, along = lane_sum(along) / p.channels;
    x.store(to, p.channels, lane, [&](int c, float value) {
      float sum = rstd * (gradient(c) - level - (value - mean) * rstd * along);
      if (p.dtokens.data != nullptr) sum += to_float(direct.row[c]) + (repeated ? others(p.dtokens, c) : 0.0f);
      return sum;
    });
  } else {
    float level = 0.0f, along = 0.0f;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int column = (v * 32 + lane) * Vector<T>::size;
      if (column >= p.channels) continue;
      const auto weight = p.weight.vector<T>(column);
#pragma unroll
      for (int e = 0; e < Vector<T>::size; ++e) {
        if (repeated) g.x[v].x[e] += others(p.dnormed, column + e);
        g.x[v].x[e] *= weight.x[e];
        x.x[v].x[e] = (x.x[v].x[e] - mean) * rstd;
        level += g.x[v].x[e], along = fmaf(g.x[v].x[e], x.x[v].x[e], along);
      }
    }
    level = p.rms ? 0.0f : lane_sum(level) / p.channels, along = lane_sum(along) / p.channels;
#pragma unroll
    for (int v = 0; v < vectors; ++v)
#pragma unroll
      for (int e = 0; e < Vector<T>::size; ++e) {
        const int c = (v * 32 + lane) * Vector<T>::size + e;
        float sum = rstd * (g.x[v].x[e] - level - x.x[v].x[e] * along);
        if (p.dtokens.data != nullptr) sum += direct.x[v].x[e] + (repeated && c < p.channels ? others(p.dtokens, c) : 0.0f);
        x.x[v].x[e] = sum;
      }
    x.store(to, p.channels, lane, [](int, float value) { return value; });
  }
}

// ---- sums over rows: dweight = sum of dnormed * xhat, dbias = sum of dnormed

constexpr int column_lanes = 16, row_lanes = 16, most_pieces = 256;

struct SumParams {
  Rows tokens, dnormed;
  const float *mean, *rstd;
  float *partial, *dweight, *dbias;  // partial [pieces][2][channels]
  std::int64_t items, piece_rows;
  int size, channels, pieces, tiles;
  bool vectors;
};

// Elements [c, c + size) of a row, those behind its end as zeros.
template <class T>
__device__ __forceinline__ Vector<T> load_columns(const void* row, int c, int channels, bool vectors) {
  const T* const p = static_cast<const T*>(row) + c;
  if (vectors) return Vector<T>::from(c < channels ? load_once(p) : uint4{});
  Vector<T> x;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) x.x[i] = c + i < channels ? to_float(p[i]) : 0.0f;
  return x;
}

// A block takes 16 vectors of columns of the rows of a piece: half a warp a row.
template <class T>
__global__ void __launch_bounds__(column_lanes* row_lanes) sum_rows_kernel(const __grid_constant__ SumParams p) {
  constexpr int size = Vector<T>::size, columns = column_lanes * size;
  __shared__ float sums[2][row_lanes][columns];
  const int column = threadIdx.x % column_lanes * size, lane = threadIdx.x / column_lanes;
  const int piece = blockIdx.x / p.tiles, first = blockIdx.x % p.tiles * columns, c = first + column;
  float weight[size] = {}, bias[size] = {};
  const std::int64_t end = min(p.items, (piece + 1) * p.piece_rows);
#pragma unroll 4
  for (std::int64_t item = piece * p.piece_rows + lane; item < end; item += row_lanes) {
    const std::int64_t b = item / p.size, i = item - b * p.size;
    const auto g = load_columns<T>(p.dnormed(b, i), c, p.channels, p.vectors),
               x = load_columns<T>(p.tokens(b, i), c, p.channels, p.vectors);
    const float mean = p.mean != nullptr ? p.mean[item] : 0.0f, rstd = p.rstd[item];
#pragma unroll
    for (int e = 0; e < size; ++e) weight[e] = fmaf(g.x[e], (x.x[e] - mean) * rstd, weight[e]), bias[e] += g.x[e];
  }
#pragma unroll
  for (int e = 0; e < size; ++e) sums[0][lane][column + e] = weight[e], sums[1][lane][column + e] = bias[e];
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * columns; i += column_lanes * row_lanes) {
    const int which = i / columns, at = i - which * columns;
    if (first + at >= p.channels) continue;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < row_lanes; ++r) sum += sums[which][r][at];
    p.partial[(static_cast<std::int64_t>(piece) * 2 + which) * p.channels + first + at] = sum;
  }
}

static __global__ void __launch_bounds__(threads) add_pieces_kernel(const __grid_constant__ SumParams p) {
  const int i = blockIdx.x * threads + threadIdx.x, which = i >= p.channels, c = i - which * p.channels;
  float* const to = which ? p.dbias : p.dweight;
  if (i >= 2 * p.channels || to == nullptr) return;
  float sum = 0.0f;
  for (int piece = 0; piece < p.pieces; ++piece)
    sum += p.partial[(static_cast<std::int64_t>(piece) * 2 + which) * p.channels + c];
  to[c] = sum;
}

std::int64_t rows_of_piece(std::int64_t items) {
  return std::max<std::int64_t>((items + most_pieces - 1) / most_pieces, 32);
}
std::int64_t pieces_of(std::int64_t items) {
  return (items + rows_of_piece(items) - 1) / rows_of_piece(items);
}

Weight weight_of(const TensorView& t) {
  return {t.data, t.dtype == DType::float32};
}
bool aligned_start(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

// Calls body with how many vectors of 16 bytes each lane of a warp holds of a row; 0: element by element.
template <class T, class Body>
void with_vectors(bool aligned, std::int64_t channels, const Body& body) {
  const std::int64_t count = (channels + 32 * Vector<T>::size - 1) / (32 * Vector<T>::size);
  if (!aligned || count > 8)
    body(std::integral_constant<int, 0>{});
  else if (count <= 2)
    body(std::integral_constant<int, 2>{});
  else if (count <= 4)
    body(std::integral_constant<int, 4>{});
  else
    body(std::integral_constant<int, 8>{});
}

}  // namespace

std::size_t workspace_bytes(const GatherNorm&) {
  return 0;
}
std::size_t workspace_bytes(const GatherNormBackward& args) {
  const std::int64_t items = args.dx.size[0] * args.tokens.index.size[1];
  return inverse_bytes(args.dx.size[0], args.dx.size[1], args.tokens.index.size[1]) +
         static_cast<std::size_t>(pieces_of(items) * 2 * args.dx.size[2]) * 4;
}

void gather_norm(const GatherNorm& args, const Launch& to) {
  const char* f = args.rms ? "gather_rms_norm" : "gather_layer_norm";
  NormParams p{rows_of(args.x), rows_of(args.tokens.rows), rows_of(args.normed), list_of(args.tokens.index),
               weight_of(args.weight)};
  if (args.bias != nullptr) p.bias = weight_of(*args.bias);
  p.mean = static_cast<float*>(args.mean), p.rstd = static_cast<float*>(args.rstd);
  p.size = static_cast<int>(args.normed.size[1]), p.total = static_cast<int>(args.x.size[1]),
  p.channels = static_cast<int>(args.x.size[2]);
  p.items = args.x.size[0] * p.size;
  p.eps = static_cast<float>(args.eps), p.rms = args.rms;
  refuse_float64(args.x.dtype, f);
  if (p.items * p.channels == 0 || p.total == 0) return;
  const bool vectors = aligned(args.x) && aligned(args.tokens.rows) && aligned(args.normed) && aligned_start(p.weight.data) &&
                       aligned_start(p.bias.data);
  with_type(args.x.dtype, f, [&]<class T>(T) {
    with_vectors<T>(vectors, p.channels, [&](auto count) {
      // Short rows two to a warp: one of 768 bytes would leave a quarter of a warp's loads empty.
      constexpr int lanes = count == 2 ? 16 : 32, vectors_each = count == 2 ? 4 : count, rows = threads / lanes;
      launch(f, norm_kernel<T, vectors_each, lanes>, grid((p.items + rows - 1) / rows, f), threads, 0,
             static_cast<cudaStream_t>(to.stream), p);
    });
  });
}

void gather_norm_backward(const GatherNormBackward& args, const Launch& to) {
  const char* f = "gather_norm_bwd";
  const auto stream = static_cast<cudaStream_t>(to.stream);
  refuse_float64(args.dx.dtype, f);
  const std::int64_t batch = args.dx.size[0], total = args.dx.size[1], channels = args.dx.size[2],
                     size = args.tokens.index.size[1];
  if (channels == 0) return;
  SumParams sums{rows_of(args.tokens.rows), rows_of(args.dnormed), static_cast<const float*>(args.mean),
                 static_cast<const float*>(args.rstd)};
  sums.partial = reinterpret_cast<float*>(static_cast<char*>(to.workspace) + inverse_bytes(batch, total, size));
  sums.dweight = static_cast<float*>(args.dweight), sums.dbias = static_cast<float*>(args.dbias);
  sums.items = batch * size, sums.piece_rows = rows_of_piece(sums.items);
  sums.size = static_cast<int>(size), sums.channels = static_cast<int>(channels),
  sums.pieces = static_cast<int>(pieces_of(sums.items));
  if (batch * total > 0) {
    const InverseParams inverse = invert(args.tokens.index, total, to.workspace, f, stream);
    NormBackwardParams p{sums.tokens, {},        sums.dnormed,  rows_of(args.dx), weight_of(args.weight),
                         sums.mean,   sums.rstd, inverse.first, inverse.next};
    bool vectors = aligned(args.tokens.rows) && aligned(args.dnormed) && aligned(args.dx) && aligned_start(p.weight.data);
    if (args.dtokens != nullptr) p.dtokens = rows_of(*args.dtokens), vectors = vectors && aligned(*args.dtokens);
    p.items = batch * total;
    p.size = sums.size, p.total = static_cast<int>(total), p.channels = sums.channels;
    p.rms = args.rms;
    with_type(args.dx.dtype, f, [&]<class T>(T) {
      with_vectors<T>(vectors, channels, [&](auto count) {
        launch(f, norm_backward_kernel<T, count>, grid((p.items + warps - 1) / warps, f), threads, 0, stream, p);
      });
      constexpr int columns = column_lanes * Vector<T>::size;
      sums.tiles = static_cast<int>((channels + columns - 1) / columns);
      sums.vectors = aligned(args.tokens.rows) && aligned(args.dnormed);
      launch(f, sum_rows_kernel<T>, grid(std::int64_t{sums.tiles} * sums.pieces, f), column_lanes * row_lanes, 0, stream, sums);
    });
  }
  if (batch * total == 0) sums.pieces = 0;
  launch(f, add_pieces_kernel, grid((2 * channels + threads - 1) / threads, f), threads, 0, stream, sums);
}

}  // namespace effcore::cuda::routing
