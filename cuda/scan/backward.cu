// The backward of the selective scan, from the last token to the first; g = dout silu(z), dh[t] the gradient of h[t]:
//
//   dh[t] = g[t] C[t] + decay[t + 1] dh[t + 1]          dC[t] = sum over channels of g[t] h[t]
//   d(dt x)[t] = sum over states of B[t] dh[t]           dB[t] = sum over channels of dt[t] x[t] dh[t]
//   q[t] = dh[t] decay[t] h[t - 1]                       dA = sum over tokens of dt[t] q[t]
//   dx = dt d(dt x) + D g                                ddt = x d(dt x) + sum over states of A q
//
// A tile's states are made again from the kept state before it and lie in shared memory (each thread reads what it wrote
// itself). Chunks work as in the forward, with the gradient of the state in the state's place. Sums over channels: within a
// warp by exchanging halves, 31 shuffles for the 32 sums of a token; over the warps in shared memory; over blocks by a second
// kernel. Bounds: bytes, x, dt, z, dout read and dx, ddt, dz written once each; instructions, some 20 a token, channel and
// state.
#include "scan/scan.cuh"

namespace effcore::cuda::scan {
namespace {

constexpr int warps = threads / 32;

// dout and z of a token -> g
__device__ __forceinline__ float gated(float dout, float z, bool gate) {
  return gate ? dout * z * sigmoid(z) : dout;
}

// What each chunk but a sequence's first sends to the one before it, where nothing comes from behind.
template <class T, int parts>
__global__ void __launch_bounds__(threads) local_backward_kernel(const __grid_constant__ ScanParams p) {
  __shared__ __align__(16) float C[tile * parts * lane_states];
  const Place<parts> at(p);
  Chunks::Chunk chunk;
  if (!p.chunks.find(at.row, chunk) || chunk.first()) return;
  float A[lane_states], dh[lane_states] = {}, sum = 0.0f;
  load_rates<T>(A, p, at);
  const float bias = p.bias.data != nullptr ? p.bias.at<T>(at.c) : 0.0f;
  for (int t0 = chunk.begin + (chunk.end - 1 - chunk.begin) / tile * tile; t0 >= chunk.begin; t0 -= tile) {
    float dt[tile], g[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      const int t = min(t0 + i, chunk.end - 1);
      dt[i] = load<T>(p.dt, chunk.batch, t, at.c);
      const float z = p.z.data != nullptr ? load<T>(p.z, chunk.batch, t, at.c) : 0.0f;
      g[i] = gated(load<T>(p.dout, chunk.batch, t, at.c), z, p.z.data != nullptr);
    }
    __syncthreads();
    stage<T, parts>(C, p.C, chunk.batch, t0, chunk.end, p.states);
    __syncthreads();
#pragma unroll
    for (int i = tile - 1; i >= 0; --i) {
      if (t0 + i >= chunk.end) continue;
      float c[lane_states];
      load_states(c, C + (i * parts + at.part) * lane_states);
      const float step = step_size<T>(p, dt[i], bias);
      sum += step;
#pragma unroll
      for (int n = 0; n < lane_states; ++n) dh[n] = exp2_approx(step * A[n]) * (dh[n] + g[i] * c[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < lane_states; ++n)
    if (at.has(p, n)) p.carried[by_state(p, at, at.row, n)] = dh[n];
  if (at.writes()) p.step_sum[std::int64_t{at.row} * p.channels + at.c] = sum;
}

// v[0, 32) of each lane -> the sums over the `run` lanes that hold the same states: lane l keeps those of l % run * parts + j,
// j < parts, in v[j]. Each step sends half of what is left to the lane across and adds what comes back.
template <int parts>
__device__ __forceinline__ void sum_across(float (&v)[2 * lane_states]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 16; half >= parts; half /= 2) {
    const int bit = half / parts;
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(~0u, send, bit);
    }
  }
}

template <int parts>
struct Shared {
  static constexpr int padded = parts * lane_states;
  float h[tile][lane_states][threads];  // the state before each token
  float x[tile][threads], dt[tile][threads], slope[tile][threads], g[tile][threads];
  float B[tile * padded], C[tile * padded];
  float sums[tile][warps][2 * padded];  // dB and dC of a warp's channels
};

template <class T, int parts>
__global__ void __launch_bounds__(threads) scan_backward_kernel(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<Shared<parts>*>(memory);
  constexpr int padded = Shared<parts>::padded;
  const Place<parts> at(p);
  const int me = threadIdx.x, warp = me / 32, lane = me % 32;
  Chunks::Chunk chunk;
  float A[lane_states], dh[lane_states], dA[lane_states] = {}, dD = 0.0f, dbias = 0.0f;
  if (p.chunks.find(at.row, chunk)) {
    load_rates<T>(A, p, at);
    load_entering(dh, p, at, chunk.sequence);
    const float bias = p.bias.data != nullptr ? p.bias.at<T>(at.c) : 0.0f;
    const float D = p.D.data != nullptr ? p.D.at<T>(at.c) : 0.0f;
    const bool gate = p.z.data != nullptr;
    const int tiles = (chunk.end - chunk.begin + tile - 1) / tile;  // none for a sequence without tokens
    for (int t0 = chunk.begin + (tiles - 1) * tile; t0 >= chunk.begin; t0 -= tile) {
      const int tokens = min(tile, chunk.end - t0);
      // From the kept state to the tile.
      float h[lane_states];
      const int start = chunk.sequence_begin + (t0 - chunk.sequence_begin) / p.keep * p.keep;
#pragma unroll
      for (int n = 0; n < lane_states; ++n) h[n] = at.has(p, n) ? p.kept[by_state(p, at, kept_row(p, chunk, start), n)] : 0.0f;
      for (int before = start; before < t0; before += tile) {
        float x[tile], dt[tile];
#pragma unroll
        for (int i = 0; i < tile; ++i)
          x[i] = load<T>(p.x, chunk.batch, before + i, at.c), dt[i] = load<T>(p.dt, chunk.batch, before + i, at.c);
        __syncthreads();
        stage<T, parts>(shared.B, p.B, chunk.batch, before, t0, p.states);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < tile; ++i) {
          float b[lane_states];
          load_states(b, shared.B + (i * parts + at.part) * lane_states);
          const float step = step_size<T>(p, dt[i], bias), dtx = step * x[i];
#pragma unroll
          for (int n = 0; n < lane_states; ++n) h[n] = exp2_approx(step * A[n]) * h[n] + dtx * b[n];
        }
      }
      float z[tile], dout[tile];
#pragma unroll
      for (int i = 0; i < tile; ++i) {
        const int t = min(t0 + i, chunk.end - 1);
        const float raw = load<T>(p.dt, chunk.batch, t, at.c) + bias;
        // Lanes behind the last channel add nothing to the sums over channels.
        shared.x[i][me] = at.valid ? load<T>(p.x, chunk.batch, t, at.c) : 0.0f;
        shared.dt[i][me] = p.softplus ? softplus(raw) : raw;
        shared.slope[i][me] = p.softplus ? sigmoid(raw) : 1.0f;
        z[i] = gate ? load<T>(p.z, chunk.batch, t, at.c) : 0.0f;
        dout[i] = at.valid ? load<T>(p.dout, chunk.batch, t, at.c) : 0.0f;
      }
      __syncthreads();
      stage<T, parts>(shared.B, p.B, chunk.batch, t0, chunk.end, p.states);
      stage<T, parts>(shared.C, p.C, chunk.batch, t0, chunk.end, p.states);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < tile; ++i) {
        if (i >= tokens) break;
        float b[lane_states], c[lane_states];
        load_states(b, shared.B + (i * parts + at.part) * lane_states);
        load_states(c, shared.C + (i * parts + at.part) * lane_states);
        const float step = shared.dt[i][me], x = shared.x[i][me], dtx = step * x;
        float y = 0.0f;
#pragma unroll
        for (int n = 0; n < lane_states; ++n) {
          shared.h[i][n][me] = h[n];
          h[n] = exp2_approx(step * A[n]) * h[n] + dtx * b[n];
          y += h[n] * c[n];
        }
        shared.g[i][me] = gated(dout[i], z[i], gate);
        if (gate) {
          y = at.over_parts(y) + D * x;
          const float open = sigmoid(z[i]);
          if (at.writes()) store<T>(p.dz, chunk.batch, t0 + i, at.c, dout[i] * y * open * (1.0f + z[i] * (1.0f - open)));
        }
      }
#pragma unroll 1
      for (int i = tokens - 1; i >= 0; --i) {
        const float step = shared.dt[i][me], x = shared.x[i][me], g = shared.g[i][me], dtx = step * x;
        float v[2 * lane_states], ddtx = 0.0f, along = 0.0f;
        {
          float b[lane_states], c[lane_states];
          load_states(b, shared.B + (i * parts + at.part) * lane_states);
          load_states(c, shared.C + (i * parts + at.part) * lane_states);
#pragma unroll
          for (int n = 0; n < lane_states; ++n) {
            const float decay = exp2_approx(step * A[n]), grad = dh[n] + g * c[n];
            const float decayed = decay * shared.h[i][n][me], q = grad * decayed;
            v[n] = grad * dtx;
            v[lane_states + n] = g * (decayed + dtx * b[n]);
            ddtx += grad * b[n];
            along += q * A[n];
            dA[n] += step * q;
            dh[n] = decay * grad;
          }
        }
        ddtx = at.over_parts(ddtx), along = at.over_parts(along);
        const float ddt = (ddtx * x + along * ln_2) * shared.slope[i][me];
        dD += g * x, dbias += ddt;
        if (at.writes()) {
          store<T>(p.dx, chunk.batch, t0 + i, at.c, ddtx * step + g * D);
          store<T>(p.ddt, chunk.batch, t0 + i, at.c, ddt);
        }
        sum_across<parts>(v);
#pragma unroll
        for (int j = 0; j < parts; ++j) {
          const int k = lane % Place<parts>::run * parts + j;  // below 16: dB, above: dC
          shared.sums[i][warp][(k / lane_states * parts + at.part) * lane_states + k % lane_states] = v[j];
        }
      }
      __syncthreads();
      const std::int64_t rows = std::int64_t{p.chunks.offsets != nullptr ? 1 : p.chunks.sequences} * p.chunks.tokens;
      for (int i = me; i < tokens * 2 * p.states; i += threads) {
        const int t = i / (2 * p.states), k = i % (2 * p.states), which = k / p.states, n = k % p.states;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < warps; ++w) sum += shared.sums[t][w][which * padded + n];
        p.input_sums[((at.block * rows + chunk.batch * p.chunks.tokens + t0 + t) * 2 + which) * p.states + n] = sum;
      }
    }
    if (chunk.first() && p.leaving != nullptr) store_leaving(dh, p, at, chunk.sequence);
  }
  float* const to = p.parameter_sums + std::int64_t{at.row} * (p.states + 2) * p.channels + at.c;
#pragma unroll
  for (int n = 0; n < lane_states; ++n)
    if (at.has(p, n)) to[std::int64_t{at.part * lane_states + n} * p.channels] = dA[n];
  if (!at.writes()) return;
  to[std::int64_t{p.states} * p.channels] = dD;
  to[std::int64_t{p.states + 1} * p.channels] = dbias;
}

// dB and dC: the sums of all channel blocks.
struct InputSumParams {
  void *dB, *dC;
  const float* parts;
  std::int64_t rows;
  int blocks, states;
};
template <class T>
__global__ void __launch_bounds__(threads) sum_inputs_kernel(const __grid_constant__ InputSumParams p) {
  const std::int64_t i = std::int64_t{blockIdx.x} * threads + threadIdx.x, size = p.rows * 2 * p.states;
  if (i >= size) return;
  float sum = 0.0f;
  for (int b = 0; b < p.blocks; ++b) sum += p.parts[b * size + i];
  const std::int64_t row = i / (2 * p.states), k = i % (2 * p.states);
  void* const to = k < p.states ? p.dB : p.dC;
  static_cast<T*>(to)[row * p.states + k % p.states] = from_float<T>(sum);
}

constexpr int wanted_blocks = 4;  // a multiprocessor: shared memory holds two of them at a time

ScanParams backward_params(const Scan& args, const char* function) {
  return params_of(args, channel_blocks(args.x.size[2], args.A.size[1]), wanted_blocks, function);
}

struct Workspace {
  std::int64_t carried, parameters, inputs;  // floats
  Workspace(const ScanParams& p, const TensorView& x)
      : carried(carried_floats(p)),
        parameters(std::int64_t{p.chunks.rows} * (p.states + 2) * p.channels),
        inputs(channel_blocks(p.channels, p.states) * x.size[0] * x.size[1] * 2 * p.states) {}
};

}  // namespace

std::size_t workspace_bytes(const ScanBackward& args) {
  const Workspace w(backward_params(args.forward, "selective_scan_bwd"), args.forward.x);
  return (w.carried + w.parameters + w.inputs) * sizeof(float);
}

void selective_scan_backward(const ScanBackward& args, const Launch& to) {
  const char* f = "selective_scan_bwd";
  const TensorView& x = args.forward.x;
  refuse_float64(x.dtype, f);
  if (args.forward.keep % tile != 0)
    throw std::invalid_argument("effcore.selective_scan_bwd: on a GPU keep must be a multiple of 8");
  ScanParams p = backward_params(args.forward, f);
  if (p.channels == 0) return;
  const auto stream = static_cast<cudaStream_t>(to.stream);
  const Workspace w(p, x);
  p.entering = static_cast<const float*>(args.dfinal), p.leaving = static_cast<float*>(args.dinitial);
  p.carried = static_cast<float*>(to.workspace);
  p.step_sum = p.carried + std::int64_t{p.chunks.rows} * p.states * p.channels;
  p.parameter_sums = p.carried + w.carried, p.input_sums = p.parameter_sums + w.parameters;
  p.dout = rows_of(args.dout), p.dx = rows_of(args.dx), p.ddt = rows_of(args.ddt), p.dz = optional_rows(args.dz);
  const std::int64_t pairs = std::int64_t{p.states} * p.channels, rows = x.size[0] * x.size[1];
  with_type(x.dtype, f, [&]<class T>(T) {
    with_parts(p.states, [&]<int parts>(std::integral_constant<int, parts>) {
      const unsigned blocks = grid(p.chunks.rows * ceil_div(p.channels, block_channels<parts>), f);
      if (!p.single && blocks > 0) {
        launch(f, local_backward_kernel<T, parts>, blocks, threads, 0, stream, p);
        launch(f, carry_kernel<T, true>, grid(ceil_div(p.chunks.sequences * pairs, threads), f), threads, 0, stream, p);
      }
      launch(f, scan_backward_kernel<T, parts>, blocks, threads, sizeof(Shared<parts>), stream, p);
    });
    const InputSumParams sums{
        args.dB.data, args.dC.data, p.input_sums, rows, static_cast<int>(channel_blocks(p.channels, p.states)), p.states};
    launch(f, sum_inputs_kernel<T>, grid(ceil_div(rows * 2 * p.states, threads), f), threads, 0, stream, sums);
  });
  const std::int64_t stride = std::int64_t{p.states + 2} * p.channels;
  const auto sum = [&](void* gradient, int first, int columns) {
    sum_parameters(f, static_cast<float*>(gradient), p.parameter_sums + first * std::int64_t{p.channels}, p.chunks.rows, stride,
                   p.channels, columns, stream);
  };
  sum(args.dA, 0, p.states);
  sum(args.dD, p.states, 1);
  sum(args.ddt_bias, p.states + 1, 1);
}

}  // namespace effcore::cuda::scan
