// The parts of a selective scan that its kernels share.
//
// Time is cut into chunks, so that few channels fill the chip as well:
//
//   local   each chunk's own effect on the state, from a zero state, and the sum of its step sizes
//   carry   the state before each chunk: h' = exp(A sum dt) h + local, chunk after chunk
//   main    the chunk again, from the right state, with everything that is written
//
// Where one chunk a sequence fills the chip, main alone runs. Within a chunk tokens come in tiles of 8 (tiles.cuh).
#pragma once
#include "scan/common.cuh"

namespace effcore::cuda::scan {

constexpr int tile = 8;

struct ScanParams {
  Chunks chunks;
  Rows x, dt, z, B, C;  // z.data == nullptr: none
  Rows out, dout;
  void *dx_data, *ddt_data, *dz_data;  // contiguous
  Parameter A, D, bias;
  int channels, states, keep;
  bool softplus, single;  // single: a sequence is one chunk
  bool vector;            // rows of tokens may be read 8 channels at a time, and rows of states 4
  bool vector_states;     // rows of B and C may be read 8 states at a time
  float* kept;            // [kept rows][states][channels], or null
  const float* entering;  // [S][channels][states]: the initial state (the backward: dfinal), or null
  float* leaving;         // the final state (the backward: dinitial), or null
  float* carried;         // [chunk rows][states][channels]
  float* step_sum;        // [chunk rows][channels]
  float* parameter_sums;  // [chunk rows][states + 2][channels]
  float* input_sums;      // [channel blocks][B * tokens][2][states]: dC, dB
};

template <class T>
__device__ __forceinline__ float load(const Rows& rows, std::int64_t b, int t, int c) {
  return to_float(reinterpret_cast<const T*>(rows(b, t))[c]);
}
template <class T>
__device__ __forceinline__ void store(const Rows& rows, std::int64_t b, int t, int c, float x) {
  reinterpret_cast<T*>(rows(b, t))[c] = from_float<T>(x);
}

// 2^(step * rate). The special function cuts its argument off, which makes decays near 1 a sixth of a rounding too small: 2e-6
// after a hundred tokens. What is added to the argument makes up for that.
__device__ __forceinline__ float decay(float step, float rate) {
  return exp2_approx(fmaf(step, rate, 0x1p-25f));
}

__device__ __forceinline__ std::int64_t kept_row(const ScanParams& p, const Chunks::Chunk& chunk, int t) {
  const int first = p.chunks.offsets != nullptr ? chunk.sequence_begin / p.keep + chunk.sequence
                                                : chunk.sequence * ((p.chunks.tokens + p.keep - 1) / p.keep);
  return first + (t - chunk.sequence_begin) / p.keep;
}

// carried[row] becomes the state that enters the chunk: sequence after sequence, forward or from the last chunk back. A thread
// for each (channel, state) of a sequence.
template <class T, bool reverse>
__global__ void __launch_bounds__(threads) carry_kernel(const __grid_constant__ ScanParams p) {
  const std::int64_t pairs = std::int64_t{p.states} * p.channels, i = std::int64_t{blockIdx.x} * threads + threadIdx.x;
  const std::int64_t s = i / pairs, pair = i - s * pairs;
  if (s >= p.chunks.sequences) return;
  const int n = static_cast<int>(pair / p.channels), c = static_cast<int>(pair % p.channels);
  const int sequence = static_cast<int>(s), length = p.chunks.end_of(sequence) - p.chunks.begin_of(sequence);
  const int count = max((length + p.chunks.length - 1) / p.chunks.length, 1), first = p.chunks.first_row(sequence);
  const float rate = p.A.at<T>(c, n) * log2_e;
  float h = p.entering != nullptr ? p.entering[(s * p.channels + c) * p.states + n] : 0.0f;
  for (int j0 = 0; j0 < count; j0 += tile) {
    float local[tile], sum[tile];
#pragma unroll
    for (int u = 0; u < tile; ++u) {
      const bool more = j0 + u + 1 < count;  // nothing leaves the last one
      const std::int64_t row = first + (reverse ? count - 1 - (j0 + u) : j0 + u);
      local[u] = more ? p.carried[row * pairs + pair] : 0.0f;
      sum[u] = more ? p.step_sum[row * p.channels + c] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < tile; ++u) {
      if (j0 + u >= count) break;
      const std::int64_t row = first + (reverse ? count - 1 - (j0 + u) : j0 + u);
      p.carried[row * pairs + pair] = h;
      h = decay(rate, sum[u]) * h + local[u];
    }
  }
}

// L: the tiling (tiles.cuh). Chunks: as many as run at once, `resident` blocks a multiprocessor, but of at least 64 tokens and
// a multiple of `keep`; one a sequence where that makes `whole` blocks a multiprocessor: then going through the tokens once is
// faster than filling the chip and going through them twice.
template <class L>
ScanParams params_of(const Scan& args, int resident, double whole, const char* function) {
  const std::int64_t tokens = args.x.size[1], keep = std::max<std::int64_t>(args.keep, tile);
  const std::int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, function);
  const std::int64_t blocks = std::max<std::int64_t>(ceil_div(args.x.size[2], L::block_channels) * args.x.size[0], 1);
  std::int64_t length = std::max<std::int64_t>(tokens, 1);
  if (static_cast<double>(blocks) < whole * static_cast<double>(processors))
    length = std::max<std::int64_t>(ceil_div(tokens, resident * processors / blocks), 64);
  length = ceil_div(length, keep) * keep;
  ScanParams p{chunks_of(args.x, args.offsets, length)};
  p.single = length >= tokens;
  p.x = rows_of(args.x), p.dt = rows_of(args.dt), p.z = optional_rows(args.z);
  p.B = rows_of(args.B), p.C = rows_of(args.C);
  p.A = parameter_of(&args.A), p.D = parameter_of(args.D), p.bias = parameter_of(args.dt_bias);
  p.channels = static_cast<int>(args.x.size[2]), p.states = static_cast<int>(args.A.size[1]);
  p.keep = static_cast<int>(args.keep), p.kept = static_cast<float*>(args.states);
  p.softplus = args.softplus;
  p.vector = p.channels % 8 == 0;
  for (const TensorView* t : {&args.x, &args.dt, args.z})
    if (t != nullptr) p.vector = p.vector && routing::aligned(*t);
  p.vector_states = p.states % 8 == 0 && routing::aligned(args.B) && routing::aligned(args.C);
  return p;
}

inline std::int64_t carried_floats(const ScanParams& p) {
  return p.single ? 0 : std::int64_t{p.chunks.rows} * (p.states + 1) * p.channels;
}

}  // namespace effcore::cuda::scan
