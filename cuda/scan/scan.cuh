// The parts of a selective scan that its kernels share.
//
// A thread holds 16 states of one channel, and a warp's neighbouring lanes neighbouring channels; where there are more states,
// `parts` lanes share a channel. Time is cut into chunks, so that few channels fill the chip as well:
//
//   local   each chunk's own effect on the state, from a zero state, and the sum of its step sizes
//   carry   the state before each chunk: h' = exp(A sum dt) h + local, chunk after chunk
//   main    the chunk again, from the right state, with everything that is written
//
// Where one chunk a sequence fills the chip, main alone runs. Tokens come in tiles of 8: a tile's B and C lie in shared memory
// as floats, and its rows are loaded before the first is used.
#pragma once
#include "scan/common.cuh"

namespace effcore::cuda::scan {

constexpr int lane_states = 16, tile = 8;

struct ScanParams {
  Chunks chunks;
  Rows x, dt, z, B, C;  // z.data == nullptr: none
  Rows out, dout, dx, ddt, dz;
  Parameter A, D, bias;
  int channels, states, keep;
  bool softplus, single;  // single: a sequence is one chunk
  float* kept;            // [kept rows][states][channels], or null
  const float* entering;  // [S][channels][states]: the initial state (the backward: dfinal), or null
  float* leaving;         // the final state (the backward: dinitial), or null
  float* carried;         // [chunk rows][states][channels]
  float* step_sum;        // [chunk rows][channels]
  float* parameter_sums;  // [chunk rows][states + 2][channels]
  float* input_sums;      // [channel blocks][B * tokens][2][states]
};

template <int parts>
constexpr int block_channels = threads / parts;

// This thread's place: channels of a block are dealt to warps in runs of 32 / parts lanes.
template <int parts>
struct Place {
  static constexpr int run = 32 / parts;
  int c, part, blocks, block, row;
  bool valid;
  __device__ explicit Place(const ScanParams& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    blocks = (p.channels + block_channels<parts> - 1) / block_channels<parts>;
    block = blockIdx.x % blocks, row = blockIdx.x / blocks;
    part = lane / run;
    c = block * block_channels<parts> + warp * run + lane % run;
    valid = c < p.channels;
    c = valid ? c : p.channels - 1;
  }
  __device__ bool has(const ScanParams& p, int n) const { return valid && part * lane_states + n < p.states; }
  __device__ bool writes() const { return valid && part == 0; }
  // The sum over the lanes that share a channel.
  __device__ static float over_parts(float x) {
#pragma unroll
    for (int bit = run; bit < 32; bit *= 2) x += __shfl_xor_sync(~0u, x, bit);
    return x;
  }
};

template <class T>
__device__ __forceinline__ float load(const Rows& rows, std::int64_t b, int t, int c) {
  return to_float(reinterpret_cast<const T*>(rows(b, t))[c]);
}
template <class T>
__device__ __forceinline__ void store(const Rows& rows, std::int64_t b, int t, int c, float x) {
  reinterpret_cast<T*>(rows(b, t))[c] = from_float<T>(x);
}

// A tile of B or C as [tile][parts * 16] floats, zeros behind the states and the tokens.
template <class T, int parts>
__device__ __forceinline__ void stage(float* to, const Rows& rows, std::int64_t b, int t0, int end, int states) {
  constexpr int padded = parts * lane_states;
  for (int i = threadIdx.x; i < tile * padded; i += threads) {
    const int t = t0 + i / padded, n = i % padded;
    to[i] = t < end && n < states ? load<T>(rows, b, t, n) : 0.0f;
  }
}

// 16 floats at a 64-byte boundary of shared memory
__device__ __forceinline__ void load_states(float (&to)[lane_states], const float* from) {
#pragma unroll
  for (int i = 0; i < lane_states; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(from + i);
    to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
  }
}

// A in base 2; zeros in the padding, so that its states stay what they are.
template <class T, int parts>
__device__ __forceinline__ void load_rates(float (&A)[lane_states], const ScanParams& p, const Place<parts>& at) {
#pragma unroll
  for (int n = 0; n < lane_states; ++n) A[n] = at.has(p, n) ? p.A.at<T>(at.c, at.part * lane_states + n) * log2_e : 0.0f;
}

// States of [rows][states][channels], and of [sequences][channels][states].
template <int parts>
__device__ __forceinline__ std::int64_t by_state(const ScanParams& p, const Place<parts>& at, std::int64_t row, int n) {
  return (row * p.states + at.part * lane_states + n) * p.channels + at.c;
}
template <int parts>
__device__ __forceinline__ std::int64_t by_channel(const ScanParams& p, const Place<parts>& at, int s, int n) {
  return (std::int64_t{s} * p.channels + at.c) * p.states + at.part * lane_states + n;
}

template <class T>
__device__ __forceinline__ float step_size(const ScanParams& p, float dt, float bias) {
  dt += bias;
  return p.softplus ? softplus(dt) : dt;
}

// The state that enters a chunk: carried, or the sequence's own.
template <int parts>
__device__ __forceinline__ void load_entering(float (&h)[lane_states], const ScanParams& p, const Place<parts>& at, int s) {
#pragma unroll
  for (int n = 0; n < lane_states; ++n) {
    h[n] = 0.0f;
    if (!at.has(p, n)) continue;
    if (!p.single)
      h[n] = p.carried[by_state(p, at, at.row, n)];
    else if (p.entering != nullptr)
      h[n] = p.entering[by_channel(p, at, s, n)];
  }
}
template <int parts>
__device__ __forceinline__ void store_leaving(const float (&h)[lane_states], const ScanParams& p, const Place<parts>& at,
                                              int s) {
#pragma unroll
  for (int n = 0; n < lane_states; ++n)
    if (at.has(p, n)) p.leaving[by_channel(p, at, s, n)] = h[n];
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
      h = exp2_approx(rate * sum[u]) * h + local[u];
    }
  }
}

// Chunks for a scan whose channels take `blocks` blocks: one a sequence where that gives each multiprocessor `wanted` blocks,
// else as many as bring it there, of at least 64 tokens and a multiple of `keep`.
inline ScanParams params_of(const Scan& args, std::int64_t blocks, int wanted, const char* function) {
  const std::int64_t tokens = args.x.size[1], keep = std::max<std::int64_t>(args.keep, tile);
  const std::int64_t target = std::int64_t{wanted} * device_attribute(cudaDevAttrMultiProcessorCount, function);
  const std::int64_t present = std::max<std::int64_t>(blocks * args.x.size[0], 1);
  std::int64_t length = std::max<std::int64_t>(tokens, 1);
  if (2 * present < target) {
    const std::int64_t chunks = ceil_div(target, present);
    length = std::max<std::int64_t>(ceil_div(tokens, chunks), 64);
  }
  length = ceil_div(length, keep) * keep;
  ScanParams p{chunks_of(args.x, args.offsets, length)};
  p.single = length >= tokens;
  p.x = rows_of(args.x), p.dt = rows_of(args.dt), p.z = optional_rows(args.z);
  p.B = rows_of(args.B), p.C = rows_of(args.C);
  p.A = parameter_of(&args.A), p.D = parameter_of(args.D), p.bias = parameter_of(args.dt_bias);
  p.channels = static_cast<int>(args.x.size[2]), p.states = static_cast<int>(args.A.size[1]);
  p.keep = static_cast<int>(args.keep), p.kept = static_cast<float*>(args.states);
  p.softplus = args.softplus;
  return p;
}

inline std::int64_t carried_floats(const ScanParams& p) {
  return p.single ? 0 : std::int64_t{p.chunks.rows} * (p.states + 1) * p.channels;
}

// Calls body(std::integral_constant<int, parts>{}) with the number of lanes that share a channel's states.
template <class Body>
void with_parts(std::int64_t states, Body&& body) {
  if (states <= lane_states)
    body(std::integral_constant<int, 1>{});
  else if (states <= 4 * lane_states)
    body(std::integral_constant<int, 4>{});
  else
    body(std::integral_constant<int, 16>{});
}
inline std::int64_t channel_blocks(std::int64_t channels, std::int64_t states) {
  std::int64_t blocks = 0;
  with_parts(states,
             [&]<int parts>(std::integral_constant<int, parts>) { blocks = ceil_div(channels, block_channels<parts>); });
  return blocks;
}

}  // namespace effcore::cuda::scan
