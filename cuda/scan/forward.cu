// The forward of the selective scan, and one step of it.
//
//   h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] B[t],   out[t] = (C[t] . h[t] + D x[t]) silu(z[t])
//
// Bounds: bytes, x, dt, z and out once each (and the kept states, N / keep floats a token and channel); and instructions, a
// special function and four others a token, channel and state, on 16 and 128 lanes of a multiprocessor.
#include "scan/tiles.cuh"

namespace effcore::cuda::scan {
namespace {

template <class L>
constexpr int resident = L::parts == 16 ? 2 : 4;  // blocks of a multiprocessor: 128 registers a thread

template <class L>
struct Shared {
  Channels<L> steps, x, gates;
  States<L> B, C;
  Biases<L> biases;
};

// A tile on its way to shared memory: its loads are under way while the tile before it is worked on.
template <class T, class L, bool outputs>
struct TileLoad {
  Run<T, L::run> x, dt, z;
  StatesLoad<T, L> B, C;
  __device__ __forceinline__ TileLoad(const ScanParams& p, const Place<L>& at, const Share<L>& share, std::int64_t b, int t0,
                                      int end)
      : x(load_share<T>(p.x, p, at, share, b, t0, end)),
        dt(load_share<T>(p.dt, p, at, share, b, t0, end)),
        z(outputs ? load_share<T>(p.z, p, at, share, b, t0, end) : Run<T, L::run>{}),
        B(p.B, b, t0, end, p.states),
        C(outputs ? p.C : p.B, b, t0, outputs ? end : t0, p.states) {}

  __device__ __forceinline__ void put(Shared<L>& shared, const ScanParams& p, const Place<L>& at, const Share<L>& share,
                                      int tokens) const {
    B.put(shared.B);
    if constexpr (outputs) C.put(shared.C);
    if (!share.any) return;
    put_steps(shared.steps, dt, shared.biases, p, at, share, tokens);
    float xs[L::run], gates[L::run];
#pragma unroll
    for (int i = 0; i < L::run; ++i) {
      xs[i] = x[i];
      if constexpr (outputs) gates[i] = p.z.data != nullptr ? z[i] * sigmoid(z[i]) : 1.0f;
    }
    store_floats(&shared.x.at[share.token][at.warp][share.channel], xs);
    if constexpr (outputs) store_floats(&shared.gates.at[share.token][at.warp][share.channel], gates);
  }
};

// outputs: all that the op writes. Otherwise the effect of each chunk but a sequence's last one, from a zero state.
template <class T, class L, bool outputs>
__global__ void __launch_bounds__(threads, resident<L>) scan_kernel(const __grid_constant__ ScanParams p) {
  __shared__ __align__(16) Shared<L> shared;
  constexpr int channels = L::channels, states = L::states;
  const Place<L> at(p);
  const Share<L> share(at.lane);
  Chunks::Chunk chunk;
  if (!p.chunks.find(at.row, chunk) || (!outputs && chunk.last())) return;
  const int mine = at.channel_in_warp();
  float A[thread_pairs], h[thread_pairs] = {}, sum = 0.0f;
  shared.biases.template fill<T>(p, at);
  load_rates<T>(A, p, at);
  if constexpr (outputs) load_entering(h, p, at, chunk.sequence);
  const float D = outputs && p.D.data != nullptr && at.writes ? p.D.at<T>(at.c) : 0.0f;
  TileLoad<T, L, outputs> load(p, at, share, chunk.batch, chunk.begin, chunk.end);
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += tile) {
    const int tokens = min(tile, chunk.end - t0);
    __syncthreads();
    load.put(shared, p, at, share, tokens);
    __syncthreads();
    load = TileLoad<T, L, outputs>(p, at, share, chunk.batch, t0 + tile, chunk.end);
    if (outputs && p.kept != nullptr && (t0 - chunk.sequence_begin) % p.keep == 0)
      store_pairs(p.kept + kept_row(p, chunk, t0) * p.states * p.channels, h, p, at);
    char* const out = outputs ? p.out(chunk.batch, t0) : nullptr;
#pragma unroll 2
    for (int i = 0; i < tokens; ++i) {
      float b[states], c[states], step[channels], x[channels], y[channels] = {};
      load_floats(b, &shared.B.at[i][at.state]);
      load_floats(step, &shared.steps.at[i][at.warp][mine]);
      load_floats(x, &shared.x.at[i][at.warp][mine]);
      if constexpr (outputs) load_floats(c, &shared.C.at[i][at.state]);
#pragma unroll
      for (int k = 0; k < channels; ++k) x[k] *= step[k];
#pragma unroll
      for (int e = 0; e < thread_pairs; ++e) {
        const int k = e % channels, j = e / channels;
        h[e] = decay(step[k], A[e]) * h[e] + x[k] * b[j];
        if constexpr (outputs) y[k] += h[e] * c[j];
      }
      if constexpr (outputs) {
        sum_lanes<1, L::state_lanes, 1>(y, at.lane);
        const float own = (y[0] + D * shared.x.at[i][at.warp][at.own]) * shared.gates.at[i][at.warp][at.own];
        if (at.writes) reinterpret_cast<T*>(out + i * p.out.token)[at.c] = from_float<T>(own);
      } else {
        sum += shared.steps.at[i][at.warp][at.own];
      }
    }
  }
  if constexpr (outputs) {
    if (chunk.last()) store_leaving(h, p, at, chunk.sequence);
  } else {
    store_pairs(p.carried + std::int64_t{at.row} * p.states * p.channels, h, p, at);
    if (at.writes) p.step_sum[std::int64_t{at.row} * p.channels + at.c] = sum;
  }
}

ScanParams forward_params(const Scan& args, const char* function) {
  ScanParams p;
  with_tiling(args.A.size[1], [&]<class L>(L) { p = params_of<L>(args, resident<L>, function); });
  return p;
}

// One token: lanes along the states, which lie next to each other in memory, so that they are moved in whole lines. Bound:
// bytes, the state read and written.
struct StepParams {
  Rows x, dt, z, B, C, out;  // [B, 1, ...]
  Parameter A, D, bias;
  const float* state;
  float* next;
  int batch, channels, states, lanes;
  bool softplus;
};

template <class T>
__global__ void __launch_bounds__(threads) step_kernel(const __grid_constant__ StepParams p) {
  const std::int64_t i = std::int64_t{blockIdx.x} * threads + threadIdx.x, pair = i / p.lanes;
  const int lane = static_cast<int>(i % p.lanes);
  const bool valid = pair < std::int64_t{p.batch} * p.channels;
  const std::int64_t b = valid ? pair / p.channels : 0, c = valid ? pair % p.channels : 0;
  float dt = load<T>(p.dt, b, 0, c) + (p.bias.data != nullptr ? p.bias.at<T>(c) : 0.0f);
  if (p.softplus) dt = softplus(dt);
  const float x = load<T>(p.x, b, 0, c), dtx = dt * x;
  float y = 0.0f;
  for (int n = lane; n < p.states && valid; n += p.lanes) {
    const float h = decay(dt, log2_e * p.A.at<T>(c, n)) * p.state[pair * p.states + n] + dtx * load<T>(p.B, b, 0, n);
    p.next[pair * p.states + n] = h;
    y += h * load<T>(p.C, b, 0, n);
  }
  for (int bit = p.lanes / 2; bit > 0; bit /= 2) y += __shfl_xor_sync(~0u, y, bit);
  if (lane != 0 || !valid) return;
  if (p.D.data != nullptr) y += p.D.at<T>(c) * x;
  if (p.z.data != nullptr) {
    const float z = load<T>(p.z, b, 0, c);
    y *= z * sigmoid(z);
  }
  store<T>(p.out, b, 0, c, y);
}

// [B, n] as rows of one token
Rows one_token(const TensorView* t) {
  if (t == nullptr) return {};
  Rows rows{static_cast<char*>(t->data), t->stride[0] * element_bytes(t->dtype), 0, nullptr};
  return rows;
}

}  // namespace

std::size_t workspace_bytes(const Scan& args) {
  return carried_floats(forward_params(args, "selective_scan")) * sizeof(float);
}

void selective_scan(const Scan& args, const Launch& to) {
  const char* f = "selective_scan";
  refuse_float64(args.x.dtype, f);
  if (args.keep % tile != 0) throw std::invalid_argument("effcore.selective_scan: on a GPU keep must be a multiple of 8");
  ScanParams p = forward_params(args, f);
  const auto stream = static_cast<cudaStream_t>(to.stream);
  const std::int64_t pairs = std::int64_t{p.states} * p.channels;
  if (p.channels == 0 || p.chunks.sequences == 0) return;
  if (p.kept != nullptr && args.offsets != nullptr)  // some rows belong to no sequence
    check(
        cudaMemsetAsync(p.kept, 0, effcore::scan::kept_states(args.x, args.offsets, args.keep) * pairs * sizeof(float), stream),
        f);
  p.out = rows_of(args.out);
  p.entering = args.initial_state != nullptr ? static_cast<const float*>(args.initial_state->data) : nullptr;
  p.leaving = static_cast<float*>(args.final_state);
  p.carried = static_cast<float*>(to.workspace), p.step_sum = p.carried + p.chunks.rows * pairs;
  with_type(args.x.dtype, f, [&]<class T>(T) {
    with_tiling(p.states, [&]<class L>(L) {
      const unsigned blocks = grid(p.chunks.rows * ceil_div(p.channels, L::block_channels), f);
      if (!p.single) {
        launch(f, scan_kernel<T, L, false>, blocks, threads, 0, stream, p);
        launch(f, carry_kernel<T, false>, grid(ceil_div(p.chunks.sequences * pairs, threads), f), threads, 0, stream, p);
      }
      launch(f, scan_kernel<T, L, true>, blocks, threads, 0, stream, p);
    });
  });
}

std::size_t workspace_bytes(const Step&) {
  return 0;
}

void selective_step(const Step& args, const Launch& to) {
  const char* f = "selective_step";
  refuse_float64(args.x.dtype, f);
  StepParams p{one_token(&args.x), one_token(&args.dt), one_token(args.z),
               one_token(&args.B), one_token(&args.C),  one_token(&args.out)};
  p.A = parameter_of(&args.A), p.D = parameter_of(args.D), p.bias = parameter_of(args.dt_bias);
  p.state = static_cast<const float*>(args.state.data), p.next = static_cast<float*>(args.new_state);
  p.batch = static_cast<int>(args.x.size[0]), p.channels = static_cast<int>(args.x.size[1]);
  p.states = static_cast<int>(args.A.size[1]), p.softplus = args.softplus;
  for (p.lanes = 1; p.lanes < p.states && p.lanes < 32;) p.lanes *= 2;
  with_type(args.x.dtype, f, [&]<class T>(T) {
    launch(f, step_kernel<T>, grid(ceil_div(std::int64_t{p.batch} * p.channels * p.lanes, threads), f), threads, 0,
           static_cast<cudaStream_t>(to.stream), p);
  });
}

}  // namespace effcore::cuda::scan
