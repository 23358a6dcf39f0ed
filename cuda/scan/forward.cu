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

// What the threads of a warp add to the outputs of a tile, a thread's states each. Rows of states and of tokens stand so far
// apart that neither the threads, which write a token's channels, nor the lanes, which read their share, meet in a bank.
template <class L>
struct Parts {
  static constexpr int row = L::warp_channels + (L::parts == 1 ? 8 : L::parts == 4 ? 4 : 0);
  static constexpr int token = L::state_lanes * row + (L::parts == 1 ? 4 : L::parts == 4 ? 8 : 2);
  float at[tile * token];

  __device__ __forceinline__ float* operator()(int t, int state_lane, int channel) {
    return &at[t * token + state_lane * row + channel];
  }
};

template <class L>
struct Shared {
  Channels<L> steps, inputs;  // dt, dt x
  States<L> B[2], C[2];       // in turns, so that warps wait for each other once a tile
  Parts<L> parts[warps];
  PerChannel<L> bias, D;
};

// This lane's share of one quantity's rows, tile after tile. Loads are under way while the tile before is worked on.
template <class T, class L>
struct ShareRows {
  const T* at;  // in the tile to load next
  std::int64_t tile_stride;
  Run<T, L::run> held;

  __device__ __forceinline__ ShareRows(const Rows& rows, const Place<L>& place, const Share<L>& share, std::int64_t b, int t0)
      : at(reinterpret_cast<const T*>(rows(b, t0 + share.token)) + place.warp_first + share.channel),
        tile_stride(tile * rows.token / static_cast<int>(sizeof(T))),
        held{} {}

  // left: of the row's channels, behind this lane's first; none where the token or the lane has nothing.
  __device__ __forceinline__ void load(int left, bool vector) {
    held = load_run<L::run>(at, 0, left, vector);
    at += tile_stride;
  }
};

// A tile on its way to shared memory.
template <class T, class L, bool outputs>
struct TileLoad {
  ShareRows<T, L> x, dt, z;
  StatesLoad<T, L> B, C;
  __device__ __forceinline__ TileLoad(const ScanParams& p, const Place<L>& at, const Share<L>& share,
                                      const Chunks::Chunk& chunk)
      : x(p.x, at, share, chunk.batch, chunk.begin),
        dt(p.dt, at, share, chunk.batch, chunk.begin),
        z(p.z, at, share, chunk.batch, chunk.begin) {}

  __device__ __forceinline__ void load(const ScanParams& p, const Place<L>& at, const Share<L>& share,
                                       const Chunks::Chunk& chunk, int t0) {
    const int left = share.any && t0 + share.token < chunk.end ? p.channels - at.warp_first - share.channel : 0;
    x.load(left, p.vector), dt.load(left, p.vector);
    B = StatesLoad<T, L>(p.B, chunk.batch, t0, chunk.end, p.states);
    if constexpr (outputs) {
      if (p.z.data != nullptr) z.load(left, p.vector);
      C = StatesLoad<T, L>(p.C, chunk.batch, t0, chunk.end, p.states);
    }
  }

  __device__ __forceinline__ void put(Shared<L>& shared, const ScanParams& p, const Place<L>& at, const Share<L>& share,
                                      int tokens, int turn) const {
    B.put(shared.B[turn]);
    if constexpr (outputs) C.put(shared.C[turn]);
    if (!share.any) return;
    float steps[L::run];
    put_steps(steps, shared.steps, dt.held, shared.bias, p, at, share, tokens);
#pragma unroll
    for (int i = 0; i < L::run; ++i) steps[i] *= x.held[i];
    store_floats(&shared.inputs.at[share.token][at.warp][share.channel], steps);
  }
};

// The outputs of this lane's share: the sums over states, what passes by D, the gate.
template <class T, class L>
__device__ __forceinline__ void finish(Shared<L>& shared, const ScanParams& p, const Place<L>& at, const Share<L>& share,
                                       const Run<T, L::run>& x, const Run<T, L::run>& z, std::int64_t b, int t0, int tokens) {
  if (!share.any || share.token >= tokens) return;
  float y[L::run], part[L::run];
  load_floats(y, shared.parts[at.warp](share.token, 0, share.channel));
#pragma unroll
  for (int s = 1; s < L::state_lanes; ++s) {
    load_floats(part, shared.parts[at.warp](share.token, s, share.channel));
#pragma unroll
    for (int i = 0; i < L::run; ++i) y[i] += part[i];
  }
  load_floats(part, &shared.D.at[at.warp][share.channel]);
#pragma unroll
  for (int i = 0; i < L::run; ++i) y[i] += part[i] * x[i];
  if (p.z.data != nullptr) {
#pragma unroll
    for (int i = 0; i < L::run; ++i) y[i] *= z[i] * gate_sigmoid<T>(z[i]);
  }
  store_run(reinterpret_cast<T*>(p.out(b, t0 + share.token)), Run<T, L::run>::of(y), at.warp_first + share.channel, p.channels,
            p.vector);
}

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
  shared.bias.template fill<T>(p.bias, p, at);
  if constexpr (outputs) shared.D.template fill<T>(p.D, p, at);
  load_rates<T>(A, p, at);
  if constexpr (outputs) load_entering(h, p, at, chunk.sequence);
  TileLoad<T, L, outputs> next(p, at, share, chunk);
  next.load(p, at, share, chunk, chunk.begin);
  int turn = 0, keep_at = chunk.begin;  // chunks begin where states are kept
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += tile, turn ^= 1) {
    const int tokens = min(tile, chunk.end - t0);
    __syncwarp();
    next.put(shared, p, at, share, tokens, turn);
    const auto x = next.x.held, z = next.z.held;
    __syncthreads();
    next.load(p, at, share, chunk, t0 + tile);
    if (outputs && p.kept != nullptr && t0 == keep_at) {
      store_pairs(p.kept + kept_row(p, chunk, t0) * p.states * p.channels, h, p, at);
      keep_at += p.keep;
    }
#pragma unroll
    for (int i = 0; i < tile; ++i) {  // steps behind the end are 0: they leave the state as it is
      float b[states], c[states], step[channels], input[channels], y[channels] = {};
      load_floats(b, &shared.B[turn].at[i][at.state]);
      load_floats(step, &shared.steps.at[i][at.warp][mine]);
      load_floats(input, &shared.inputs.at[i][at.warp][mine]);
      if constexpr (outputs) load_floats(c, &shared.C[turn].at[i][at.state]);
#pragma unroll
      for (int e = 0; e < thread_pairs; ++e) {
        const int k = e % channels, j = e / channels;
        h[e] = decay(step[k], A[e]) * h[e] + input[k] * b[j];
        if constexpr (outputs) y[k] += h[e] * c[j];
      }
      if constexpr (outputs)
        store_floats(shared.parts[at.warp](i, at.state / states, mine), y);
      else
        sum += shared.steps.at[i][at.warp][at.own];
    }
    if constexpr (outputs) {
      __syncwarp();
      finish<T>(shared, p, at, share, x, z, chunk.batch, t0, tokens);
    }
  }
  if constexpr (outputs) {
    if (chunk.last()) store_leaving(h, p, at, chunk.sequence);
  } else {
    store_pairs(p.carried + std::int64_t{at.row} * p.states * p.channels, h, p, at);
    if (at.writes) p.step_sum[std::int64_t{at.row} * p.channels + at.c] = sum;
  }
}

__device__ __forceinline__ float select(bool which, float yes, float no) {
  float x;
  asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }" : "=f"(x) : "f"(yes), "f"(no), "r"(static_cast<int>(which)));
  return x;
}
template <class L>
struct Shared3 {
  struct Turn {
    Channels<L> steps, inputs, gates, skips;  // dt, dt x, silu(z), D x silu(z)
    States<L> B, C;
  } turn[2];
  Parts<L> parts[warps];
  PerChannel<L> bias, D;
};

template <class T, class L, bool outputs>
struct TileLoad3 : TileLoad<T, L, outputs> {
  using TileLoad<T, L, outputs>::TileLoad;
  __device__ __forceinline__ void put3(typename Shared3<L>::Turn& to, const Shared3<L>& shared, const ScanParams& p, const Place<L>& at,
                                       const Share<L>& share, int tokens) const {
    this->B.put(to.B);
    if constexpr (outputs) this->C.put(to.C);
    if (L::warp_channels * tile < 32 * L::run && !share.any) return;
    float v[L::run], other[L::run];
    load_floats(v, &shared.bias.at[at.warp][share.channel]);
#pragma unroll
    for (int i = 0; i < L::run; ++i) {
      const float sum = v[i] + this->dt.held[i], s = softplus(sum);
      v[i] = select(share.token < tokens, select(p.softplus, s, sum), 0.0f);
    }
    store_floats(&to.steps.at[share.token][at.warp][share.channel], v);
#pragma unroll
    for (int i = 0; i < L::run; ++i) v[i] *= this->x.held[i];
    store_floats(&to.inputs.at[share.token][at.warp][share.channel], v);
    if constexpr (outputs) {
      load_floats(other, &shared.D.at[at.warp][share.channel]);
      const bool gate = p.z.data != nullptr;
#pragma unroll
      for (int i = 0; i < L::run; ++i) {
        const float z = this->z.held[i], g = z * gate_sigmoid<T>(z);
        v[i] = select(gate, g, 1.0f);
        other[i] *= this->x.held[i] * v[i];
      }
      store_floats(&to.gates.at[share.token][at.warp][share.channel], v);
      store_floats(&to.skips.at[share.token][at.warp][share.channel], other);
    }
  }
};

template <class T, class L, bool outputs>
__global__ void __launch_bounds__(threads, resident<L>) scan_kernel3(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<Shared3<L>*>(memory);
  constexpr int channels = L::channels, states = L::states;
  const Place<L> at(p);
  const Share<L> share(at.lane);
  Chunks::Chunk chunk;
  if (!p.chunks.find(at.row, chunk) || (!outputs && chunk.last())) return;
  const int mine = at.channel_in_warp();
  float A[thread_pairs], h[thread_pairs] = {}, sum = 0.0f;
  shared.bias.template fill<T>(p.bias, p, at);
  if constexpr (outputs) shared.D.template fill<T>(p.D, p, at);
  load_rates<T>(A, p, at);
  if constexpr (outputs) load_entering(h, p, at, chunk.sequence);
  TileLoad3<T, L, outputs> next(p, at, share, chunk);
  next.load(p, at, share, chunk, chunk.begin);
  __syncwarp();
  next.put3(shared.turn[0], shared, p, at, share, chunk.end - chunk.begin);
  next.load(p, at, share, chunk, chunk.begin + tile);
  __syncthreads();
  int turn = 0, keep_at = chunk.begin;  // chunks begin where states are kept
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += tile, turn ^= 1) {
    if (outputs && p.kept != nullptr && t0 == keep_at) {
      store_pairs(p.kept + kept_row(p, chunk, t0) * p.states * p.channels, h, p, at);
      keep_at += p.keep;
    }
    auto& now = shared.turn[turn];
    next.put3(shared.turn[turn ^ 1], shared, p, at, share, chunk.end - t0 - tile);
#pragma unroll
    for (int i = 0; i < tile; ++i) {  // steps behind the end are 0: they leave the state as it is
      if (i == tile / 2) next.load(p, at, share, chunk, t0 + 2 * tile);
      float b[states], c[states], step[channels], input[channels], y[channels] = {};
      load_floats(b, &now.B.at[i][at.state]);
      load_floats(step, &now.steps.at[i][at.warp][mine]);
      load_floats(input, &now.inputs.at[i][at.warp][mine]);
      if constexpr (outputs) load_floats(c, &now.C.at[i][at.state]);
#pragma unroll
      for (int e = 0; e < thread_pairs; ++e) {
        const int k = e % channels, j = e / channels;
        h[e] = decay(step[k], A[e]) * h[e] + input[k] * b[j];
        if constexpr (outputs) y[k] += h[e] * c[j];
      }
      if constexpr (outputs)
        store_floats(shared.parts[at.warp](i, at.state / states, mine), y);
      else
        sum += now.steps.at[i][at.warp][at.own];
    }
    if constexpr (outputs) {
      __syncwarp();
      if (share.any && t0 + share.token < chunk.end) {
        float y[L::run], part[L::run], gates[L::run];
        load_floats(y, shared.parts[at.warp](share.token, 0, share.channel));
#pragma unroll
        for (int s = 1; s < L::state_lanes; ++s) {
          load_floats(part, shared.parts[at.warp](share.token, s, share.channel));
#pragma unroll
          for (int i = 0; i < L::run; ++i) y[i] += part[i];
        }
        load_floats(part, &now.skips.at[share.token][at.warp][share.channel]);
        load_floats(gates, &now.gates.at[share.token][at.warp][share.channel]);
#pragma unroll
        for (int i = 0; i < L::run; ++i) y[i] = y[i] * gates[i] + part[i];
        store_run(reinterpret_cast<T*>(p.out(chunk.batch, t0 + share.token)), Run<T, L::run>::of(y), at.warp_first + share.channel,
                  p.channels, p.vector);
      }
    }
    __syncthreads();
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
  p.out = rows_of(args.out), p.vector = p.vector && routing::aligned(args.out);
  p.entering = args.initial_state != nullptr ? static_cast<const float*>(args.initial_state->data) : nullptr;
  p.leaving = static_cast<float*>(args.final_state);
  p.carried = static_cast<float*>(to.workspace), p.step_sum = p.carried + p.chunks.rows * pairs;
  with_type(args.x.dtype, f, [&]<class T>(T) {
    with_tiling(p.states, [&]<class L>(L) {
      const unsigned blocks = grid(p.chunks.rows * ceil_div(p.channels, L::block_channels), f);
      if (!p.single) {
        if (getenv("SCAN_V3"))
          launch(f, scan_kernel3<T, L, false>, blocks, threads, sizeof(Shared3<L>), stream, p);
        else
          launch(f, scan_kernel<T, L, false>, blocks, threads, 0, stream, p);
        launch(f, carry_kernel<T, false>, grid(ceil_div(p.chunks.sequences * pairs, threads), f), threads, 0, stream, p);
      }
      if (getenv("SCAN_V3"))
        launch(f, scan_kernel3<T, L, true>, blocks, threads, sizeof(Shared3<L>), stream, p);
      else
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
