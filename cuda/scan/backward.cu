// The backward of the selective scan, from the last token to the first; g = dout silu(z), dh[t] the gradient of h[t]:
//
//   dh[t] = g[t] C[t] + decay[t + 1] dh[t + 1]          dC[t] = sum over channels of g[t] h[t]
//   d(dt x)[t] = sum over states of B[t] dh[t]           dB[t] = sum over channels of dt[t] x[t] dh[t]
//   q[t] = dh[t] decay[t] h[t - 1]                       dA = sum over tokens of dt[t] q[t]
//   dx = dt d(dt x) + D g                                ddt = x d(dt x) + sum over states of A q
//
// Spans of tokens are gone through twice. Forward from the kept state before them: decay h[t - 1] of each token goes to shared
// memory (each thread reads what it wrote itself), dz and the warp's part of dC are made. Then back: everything else. Chunks
// work as in the forward, with the gradient of the state in the state's place. Sums over channels: 4 within a thread, then
// over the lanes of a warp, over the warps in shared memory, and over blocks by a second kernel; sums over chunks in double
// precision.
//
// Bounds: bytes, x, dt, z, dout read and dx, ddt, dz written once each, and the kept states; instructions, 20 and three special
// functions a token, channel and state, of which a quarter makes states again to get to a span.
#include "scan/tiles.cuh"

namespace effcore::cuda::scan {
namespace {

// Tokens that are gone through forth and back at once, and blocks of a multiprocessor. Shared memory holds the states of a
// span; half a tile leaves room for four blocks, which all channels of 32 texts take at once.
template <class L>
constexpr int span = L::parts == 1 ? tile / 2 : tile;
template <class L>
constexpr int resident = L::parts == 1 ? 4 : (L::parts == 4 ? 2 : 1);

// dout and z of a token -> g = dout silu(z), and dz / y
struct Gate {
  float g, slope;
  __device__ __forceinline__ Gate(float dout, float z, bool gate) : g(dout), slope(0.0f) {
    if (!gate) return;
    const float open = sigmoid(z);
    g = dout * z * open, slope = dout * open * (1.0f + z * (1.0f - open));
  }
};

// What each chunk but a sequence's first sends to the one before it, where nothing comes from behind.
template <class T, class L>
__global__ void __launch_bounds__(threads, L::parts == 1 ? 4 : 1) local_backward_kernel(const __grid_constant__ ScanParams p) {
  __shared__ __align__(16) States<L> C;
  __shared__ __align__(16) Channels<L> steps, g;
  __shared__ __align__(16) PerChannel<L> bias;
  const Place<L> at(p);
  const Share<L> share(at.lane);
  Chunks::Chunk chunk;
  if (!p.chunks.find(at.row, chunk) || chunk.first()) return;
  bias.template fill<T>(p.bias, p, at);
  const bool gate = p.z.data != nullptr;
  const int mine = at.channel_in_warp();
  float A[thread_pairs], dh[thread_pairs] = {}, sum = 0.0f;
  load_rates<T>(A, p, at);
  for (int t0 = chunk.begin + (chunk.end - 1 - chunk.begin) / tile * tile; t0 >= chunk.begin; t0 -= tile) {
    const auto dt = load_share<T>(p.dt, p, at, share, chunk.batch, t0, chunk.end);
    const auto z = load_share<T>(p.z, p, at, share, chunk.batch, t0, chunk.end);
    const auto dout = load_share<T>(p.dout, p, at, share, chunk.batch, t0, chunk.end);
    const StatesLoad<T, L> c_load(p.C, chunk.batch, t0, chunk.end, p.states);
    const int tokens = min(tile, chunk.end - t0);
    __syncthreads();
    c_load.put(C);
    if (share.any) {
      float made[L::run], gs[L::run];
      put_steps(made, steps, dt, bias, p, at, share, tokens);
#pragma unroll
      for (int i = 0; i < L::run; ++i) gs[i] = Gate(dout[i], z[i], gate).g;
      store_floats(&g.at[share.token][at.warp][share.channel], gs);
    }
    __syncthreads();
#pragma unroll 2
    for (int i = tokens - 1; i >= 0; --i) {
      float c[L::states], step[L::channels], gs[L::channels];
      load_floats(c, &C.at[i][at.state]);
      load_floats(step, &steps.at[i][at.warp][mine]);
      load_floats(gs, &g.at[i][at.warp][mine]);
#pragma unroll
      for (int e = 0; e < thread_pairs; ++e) {
        const int k = e % L::channels, j = e / L::channels;
        dh[e] = decay(step[k], A[e]) * (dh[e] + gs[k] * c[j]);
      }
      sum += steps.at[i][at.warp][at.own];
    }
  }
  store_pairs(p.carried + std::int64_t{at.row} * p.states * p.channels, dh, p, at);
  if (at.writes) p.step_sum[std::int64_t{at.row} * p.channels + at.c] = sum;
}

template <class L>
struct Shared {
  static constexpr int starts = span<L> < tile ? 1 : 0;
  // decay h[t - 1] of each token of a span but the last; the state before the tile
  float4 decayed[span<L> - 1 + starts][thread_pairs / 4][threads];
  Channels<L> x, steps, g;
  States<L> B, C;
  PerChannel<L> bias;
  // Of a token and warp: dz / y of each channel until y is known, then the sums of dC and of dB.
  static constexpr int sums_width = L::warp_channels > 2 * L::padded ? L::warp_channels : 2 * L::padded;
  float sums[tile][warps][sums_width];
};

// Puts the tile [t0, t0 + tokens) in shared memory; the block's threads wait for each other before and after.
template <class T, class L>
__device__ __forceinline__ void stage(Shared<L>& shared, const ScanParams& p, const Place<L>& at, const Share<L>& share,
                                      const Chunks::Chunk& chunk, int t0, bool back) {
  const auto dt = load_share<T>(p.dt, p, at, share, chunk.batch, t0, chunk.end);
  const auto x = load_share<T>(p.x, p, at, share, chunk.batch, t0, chunk.end);
  Run<T, L::run> dout{}, z{};
  if (back) {
    dout = load_share<T>(p.dout, p, at, share, chunk.batch, t0, chunk.end);
    z = load_share<T>(p.z, p, at, share, chunk.batch, t0, chunk.end);
  }
  const StatesLoad<T, L> b_load(p.B, chunk.batch, t0, chunk.end, p.states), c_load(p.C, chunk.batch, t0, chunk.end, p.states);
  __syncthreads();
  b_load.put(shared.B), c_load.put(shared.C);
  if (share.any) {
    float made[L::run], xs[L::run], gs[L::run], slopes[L::run];
    put_steps(made, shared.steps, dt, shared.bias, p, at, share, chunk.end - t0);
#pragma unroll
    for (int i = 0; i < L::run; ++i) {
      xs[i] = x[i];
      const Gate gate(dout[i], z[i], p.z.data != nullptr);
      gs[i] = gate.g, slopes[i] = gate.slope;
    }
    store_floats(&shared.x.at[share.token][at.warp][share.channel], xs);
    if (back) {
      store_floats(&shared.g.at[share.token][at.warp][share.channel], gs);
      store_floats(&shared.sums[share.token][at.warp][share.channel], slopes);
    }
  }
  __syncthreads();
}

// Registers <-> a thread's own place in shared memory.
__device__ __forceinline__ void put(float4 (&to)[thread_pairs / 4][threads], const float (&x)[thread_pairs]) {
#pragma unroll
  for (int q = 0; q < thread_pairs / 4; ++q)
    to[q][threadIdx.x] = make_float4(x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]);
}
__device__ __forceinline__ void get(float (&x)[thread_pairs], const float4 (&from)[thread_pairs / 4][threads]) {
#pragma unroll
  for (int q = 0; q < thread_pairs / 4; ++q) {
    const float4 v = from[q][threadIdx.x];
    x[4 * q] = v.x, x[4 * q + 1] = v.y, x[4 * q + 2] = v.z, x[4 * q + 3] = v.w;
  }
}

template <class T, class L>
__global__ void __launch_bounds__(threads, resident<L>) scan_backward_kernel(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<Shared<L>*>(memory);
  constexpr int channels = L::channels, states = L::states, length = span<L>;
  // Lanes that end with the same sums over channels, and how many of them.
  constexpr int sums_left = states / L::channel_lanes > 1 ? states / L::channel_lanes : 1;
  constexpr int sums_sharing = L::channel_lanes * sums_left / states > 1 ? L::channel_lanes * sums_left / states : 1;
  const Place<L> at(p);
  const Share<L> share(at.lane);
  const int mine = at.channel_in_warp(), channel_lane = at.lane / L::state_lanes;
  const bool writes_sums = channel_lane % sums_sharing == 0;
  const int sums_at = at.state + channel_lane / sums_sharing * sums_left;
  Chunks::Chunk chunk;
  float dA[thread_pairs] = {}, dD = 0.0f, dbias = 0.0f;
  if (p.chunks.find(at.row, chunk)) {
    float A[thread_pairs], dh[thread_pairs];
    shared.bias.template fill<T>(p.bias, p, at);
    load_rates<T>(A, p, at);
    load_entering(dh, p, at, chunk.sequence);
    const float D = p.D.data != nullptr && at.writes ? p.D.at<T>(at.c) : 0.0f;
    const bool gate = p.z.data != nullptr;
    const std::int64_t rows = std::int64_t{p.chunks.offsets != nullptr ? 1 : p.chunks.sequences} * p.chunks.tokens;
    const int tiles = (chunk.end - chunk.begin + tile - 1) / tile;  // none for a sequence without tokens
    for (int t0 = chunk.begin + (tiles - 1) * tile; t0 >= chunk.begin; t0 -= tile) {
      const int tokens = min(tile, chunk.end - t0);
      float h[thread_pairs], decayed[thread_pairs];
      // From the kept state to the tile.
      const int start = chunk.sequence_begin + (t0 - chunk.sequence_begin) / p.keep * p.keep;
      load_pairs(h, p.kept + kept_row(p, chunk, start) * p.states * p.channels, p, at);
      const auto advance = [&](int count) {  // h over the first tokens in shared memory
#pragma unroll 2
        for (int i = 0; i < count; ++i) {
          float b[states], step[channels], x[channels];
          load_floats(b, &shared.B.at[i][at.state]);
          load_floats(step, &shared.steps.at[i][at.warp][mine]);
          load_floats(x, &shared.x.at[i][at.warp][mine]);
#pragma unroll
          for (int k = 0; k < channels; ++k) x[k] *= step[k];
#pragma unroll
          for (int e = 0; e < thread_pairs; ++e) {
            const int k = e % channels, j = e / channels;
            h[e] = decay(step[k], A[e]) * h[e] + x[k] * b[j];
          }
        }
      };
      for (int before = start; before < t0; before += tile) {
        stage<T>(shared, p, at, share, chunk, before, false);
        advance(tile);
      }
      stage<T>(shared, p, at, share, chunk, t0, true);
      // The outputs' rows lie next to each other, without padding.
      const std::int64_t out = (chunk.batch * p.chunks.tokens + t0) * p.channels + at.c;
#pragma unroll 1
      for (int first = (tokens - 1) / length * length; first >= 0; first -= length) {
        const int end = min(first + length, tokens);
        if constexpr (length < tile) {  // two spans
          if (first > 0) {
            put(shared.decayed[length - 1], h);
            advance(length);
          } else if (tokens > length) {
            get(h, shared.decayed[length - 1]);
          }
        }
#pragma unroll 1
        for (int i = first; i < end; ++i) {
          float b[states], c[states], step[channels], x[channels], g[channels], y[channels] = {}, dC[states] = {};
          load_floats(b, &shared.B.at[i][at.state]);
          load_floats(c, &shared.C.at[i][at.state]);
          load_floats(step, &shared.steps.at[i][at.warp][mine]);
          load_floats(x, &shared.x.at[i][at.warp][mine]);
          load_floats(g, &shared.g.at[i][at.warp][mine]);
#pragma unroll
          for (int k = 0; k < channels; ++k) x[k] *= step[k];
#pragma unroll
          for (int e = 0; e < thread_pairs; ++e) {
            const int k = e % channels, j = e / channels;
            decayed[e] = decay(step[k], A[e]) * h[e];
            h[e] = decayed[e] + x[k] * b[j];
            y[k] += h[e] * c[j];
            dC[j] += g[k] * h[e];
          }
          if (i < end - 1) put(shared.decayed[i - first], decayed);
          if (gate) {
            sum_lanes<1, L::state_lanes, 1>(y, at.lane);
            if (at.writes)
              static_cast<T*>(p.dz_data)[out + i * p.channels] =
                  from_float<T>(shared.sums[i][at.warp][at.own] * (y[0] + D * shared.x.at[i][at.warp][at.own]));
            __syncwarp();
          }
          sum_lanes<1, L::channel_lanes, L::state_lanes>(dC, at.lane);
          if (writes_sums) {
#pragma unroll
            for (int j = 0; j < sums_left; ++j) shared.sums[i][at.warp][sums_at + j] = dC[j];
          }
        }
#pragma unroll 1
        for (int i = end - 1; i >= first; --i) {
          float b[states], c[states], step[channels], x[channels], g[channels], dB[states] = {}, sums[2 * channels] = {};
          load_floats(b, &shared.B.at[i][at.state]);
          load_floats(c, &shared.C.at[i][at.state]);
          load_floats(step, &shared.steps.at[i][at.warp][mine]);
          load_floats(x, &shared.x.at[i][at.warp][mine]);
          load_floats(g, &shared.g.at[i][at.warp][mine]);
#pragma unroll
          for (int k = 0; k < channels; ++k) x[k] *= step[k];
#pragma unroll
          for (int e = 0; e < thread_pairs; ++e) {
            const int k = e % channels, j = e / channels;
            const float grad = dh[e] + g[k] * c[j], q = grad * decayed[e];
            dB[j] += grad * x[k];
            sums[2 * k] += grad * b[j];
            sums[2 * k + 1] += q * A[e];
            dA[e] += step[k] * q;
            dh[e] = decay(step[k], A[e]) * grad;
          }
          if (i > first) get(decayed, shared.decayed[i - first - 1]);
          sum_lanes<2, L::state_lanes, 1>(sums, at.lane);
          if (at.writes) {
            const float own_step = shared.steps.at[i][at.warp][at.own], own_x = shared.x.at[i][at.warp][at.own];
            const float own_g = shared.g.at[i][at.warp][at.own];
            // The slope of the softplus is 1 - e^-softplus.
            const float ddt = (sums[0] * own_x + sums[1] * ln_2) * (p.softplus ? -expm1f(-own_step) : 1.0f);
            dD += own_g * own_x, dbias += ddt;
            static_cast<T*>(p.dx_data)[out + i * p.channels] = from_float<T>(sums[0] * own_step + own_g * D);
            static_cast<T*>(p.ddt_data)[out + i * p.channels] = from_float<T>(ddt);
          }
          sum_lanes<1, L::channel_lanes, L::state_lanes>(dB, at.lane);
          if (writes_sums) {
#pragma unroll
            for (int j = 0; j < sums_left; ++j) shared.sums[i][at.warp][L::padded + sums_at + j] = dB[j];
          }
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < tokens * 2 * L::padded; i += threads) {
        const int t = i / (2 * L::padded), which = i / L::padded % 2, n = i % L::padded;
        if (n >= p.states) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < warps; ++w) sum += shared.sums[t][w][which * L::padded + n];
        p.input_sums[((at.block * rows + chunk.batch * p.chunks.tokens + t0 + t) * 2 + which) * p.states + n] = sum;
      }
    }
    if (chunk.first() && p.leaving != nullptr) store_leaving(dh, p, at, chunk.sequence);
  }
  float* const to = p.parameter_sums + std::int64_t{at.row} * (p.states + 2) * p.channels;
  store_pairs(to, dA, p, at);
  if (!at.writes) return;
  to[std::int64_t{p.states} * p.channels + at.c] = dD;
  to[std::int64_t{p.states + 1} * p.channels + at.c] = dbias;
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
  void* const to = k < p.states ? p.dC : p.dB;
  static_cast<T*>(to)[row * p.states + k % p.states] = from_float<T>(sum);
}

ScanParams backward_params(const Scan& args, const char* function) {
  ScanParams p;
  with_tiling(args.A.size[1], [&]<class L>(L) { p = params_of<L>(args, resident<L>, 0.5 * resident<L>, function); });
  return p;
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
  const auto stream = static_cast<cudaStream_t>(to.stream);
  const Workspace w(p, x);
  p.entering = static_cast<const float*>(args.dfinal), p.leaving = static_cast<float*>(args.dinitial);
  p.carried = static_cast<float*>(to.workspace);
  p.step_sum = p.carried + std::int64_t{p.chunks.rows} * p.states * p.channels;
  p.parameter_sums = p.carried + w.carried, p.input_sums = p.parameter_sums + w.parameters;
  p.dout = rows_of(args.dout), p.vector = p.vector && routing::aligned(args.dout);
  p.dx_data = args.dx.data, p.ddt_data = args.ddt.data, p.dz_data = args.dz != nullptr ? args.dz->data : nullptr;
  const std::int64_t pairs = std::int64_t{p.states} * p.channels, rows = x.size[0] * x.size[1];
  with_type(x.dtype, f, [&]<class T>(T) {
    with_tiling(p.states, [&]<class L>(L) {
      const unsigned blocks = grid(p.chunks.rows * ceil_div(p.channels, L::block_channels), f);
      if (!p.single && blocks > 0) {
        launch(f, local_backward_kernel<T, L>, blocks, threads, 0, stream, p);
        launch(f, carry_kernel<T, true>, grid(ceil_div(p.chunks.sequences * pairs, threads), f), threads, 0, stream, p);
      }
      launch(f, scan_backward_kernel<T, L>, blocks, threads, sizeof(Shared<L>), stream, p);
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
