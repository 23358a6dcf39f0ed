// The forward of the selective scan, and one step of it.
//
//   h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] B[t],   out[t] = (C[t] . h[t] + D x[t]) silu(z[t])
//
// Bounds: bytes, x, dt, z and out once each (and the kept states, N / keep floats a token and channel); and instructions: N + 3
// special functions a token and channel, on 16 lanes of a multiprocessor, and five others a state, on 128.
//
// Up to 16 states go through channel_forward.cuh, or spread_forward.cuh where channels are few, and up to 64 as well where they
// are many. Else channels and states are spread over threads (tiles.cuh), and while a tile is worked on the next one is made:
// step sizes, inputs and gates, in shared memory. That and the tile's first four tokens are one run of instructions without a
// branch, so that little waits for what stands before it. Threads leave their sums over states in shared memory, and whole rows
// are written from there.
#include <cmath>

#include "scan/channel_forward.cuh"
#include "scan/spread_forward.cuh"

namespace effcore::cuda::scan {
namespace {

template <class L>
constexpr int resident = L::padded == 256 ? 2 : 4;  // blocks of a multiprocessor: 128 registers a thread

// Blocks a multiprocessor from which on tokens are gone through once.
template <class L>
constexpr double fills = 0.75;
template <>
constexpr double fills<Whole> = 1.5;
template <int split, int padded, int roles>
constexpr double fills<Spread<split, padded, roles>> = 0.0;  // in any case

// What the threads of a warp add to the outputs of a tile, a thread's states each. Rows of states and of tokens stand so far
// apart that neither the threads, which write a token's channels, nor the lanes, which read their share, meet in a bank.
template <class L>
struct Parts {
  static constexpr int row = L::warp_channels + (L::parts == 4 ? 4 : 0);
  static constexpr int token = L::state_lanes * row + (L::parts == 4 ? 8 : 2);
  float at[tile * token];

  __device__ __forceinline__ float* operator()(int t, int state_lane, int channel) {
    return &at[t * token + state_lane * row + channel];
  }
};

// What is made of a tile before it is worked on.
template <class L>
struct Tile {
  Channels<L> steps, inputs, gates, skips;  // dt, dt x, silu(z), D x silu(z)
  States<L> B, C;
};
template <class L>
struct Shared {
  Tile<L> tiles[2];  // one is worked on, the next is made
  Parts<L> parts[warps];
  PerChannel<L> bias, D;
};

// This lane's share of one quantity's rows, tile after tile.
template <class T, class L>
struct ShareRows {
  const T* at;  // in the tile to load next
  std::int64_t tile_stride;
  Run<T, L::run> held;

  __device__ __forceinline__ ShareRows(const Rows& rows, const Place<L>& place, const Share<L>& share, std::int64_t b, int t0)
      : at(reinterpret_cast<const T*>(rows(b, t0 + share.token)) + place.warp_first + share.channel),
        tile_stride(tile * rows.token / static_cast<int>(sizeof(T))),
        held{} {}

  // left: channels of the row from this lane's first one on; 0 where the token or the lane has nothing
  __device__ __forceinline__ void load(int left, bool vector) {
    held = load_run<L::run>(at, 0, left, vector);
    at += tile_stride;
  }
};

// A tile on its way from global to shared memory.
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

  // tokens: of the tile. Without branches, so that this mixes with the work on the tile before.
  __device__ __forceinline__ void put(Tile<L>& to, const Shared<L>& shared, const ScanParams& p, const Place<L>& at,
                                      const Share<L>& share, int tokens) const {
    B.put(to.B);
    if constexpr (outputs) C.put(to.C);
    if (!L::all_share && !share.any) return;
    const auto place = [&](auto& of) { return &of.at[share.token][at.warp][share.channel]; };
    float v[L::run], skip[L::run];
    load_floats(v, &shared.bias.at[at.warp][share.channel]);
#pragma unroll
    for (int i = 0; i < L::run; ++i) {
      const float sum = v[i] + dt.held[i];
      v[i] = select(share.token < tokens, select(p.softplus, softplus(sum), sum), 0.0f);
    }
    store_floats(place(to.steps), v);
#pragma unroll
    for (int i = 0; i < L::run; ++i) v[i] *= x.held[i];
    store_floats(place(to.inputs), v);
    if constexpr (outputs) {
      load_floats(skip, &shared.D.at[at.warp][share.channel]);
#pragma unroll
      for (int i = 0; i < L::run; ++i) {
        v[i] = select(p.z.data != nullptr, z.held[i] * gate_sigmoid<T>(z.held[i]), 1.0f);
        skip[i] *= x.held[i] * v[i];
      }
      store_floats(place(to.gates), v);
      store_floats(place(to.skips), skip);
    }
  }
};

// The outputs of this lane's share: the sums over states, the gate, what passes by D.
template <class T, class L>
__device__ __forceinline__ void finish(Shared<L>& shared, Tile<L>& now, const ScanParams& p, const Place<L>& at,
                                       const Share<L>& share, std::int64_t b, int t) {
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
  store_run(reinterpret_cast<T*>(p.out(b, t)), Run<T, L::run>::of(y), at.warp_first + share.channel, p.channels, p.vector);
}

// outputs: all that the op writes. Otherwise the effect of each chunk but a sequence's last one, from a zero state.
template <class T, class L, bool outputs>
__global__ void __launch_bounds__(threads, resident<L>) scan_kernel(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<Shared<L>*>(memory);
  constexpr int channels = L::channels, states = L::states;
  const Place<L> at(p);
  const Share<L> share(at.lane);
  Chunks::Chunk chunk;
  if (!p.chunks.find(at.row, chunk) || (!outputs && chunk.last())) return;
  const int mine = at.channel_in_warp();
  float A[thread_pairs], h[thread_pairs] = {}, sum = 0.0f;
  TileLoad<T, L, outputs> next(p, at, share, chunk);
  next.load(p, at, share, chunk, chunk.begin);
  shared.bias.template fill<T>(p.bias, p, at);
  if constexpr (outputs) shared.D.template fill<T>(p.D, p, at);
  load_rates<T>(A, p, at);
  if constexpr (outputs) load_entering(h, p, at, chunk.sequence);
  __syncwarp();
  next.put(shared.tiles[0], shared, p, at, share, chunk.end - chunk.begin);
  next.load(p, at, share, chunk, chunk.begin + tile);
  __syncthreads();
  int turn = 0, keep_at = chunk.begin;  // chunks begin where states are kept
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += tile, turn ^= 1) {
    if (outputs && p.kept != nullptr && t0 == keep_at) {
      store_pairs(p.kept + kept_row(p, chunk, t0) * p.states * p.channels, h, p, at);
      keep_at += p.keep;
    }
    Tile<L>& now = shared.tiles[turn];
    next.put(shared.tiles[turn ^ 1], shared, p, at, share, chunk.end - t0 - tile);
#pragma unroll
    for (int i = 0; i < tile; ++i) {  // steps behind the end are 0: they leave the state as it is
      if (i == tile / 2) next.load(p, at, share, chunk, t0 + 2 * tile);  // by then put has let its registers go
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
      const int t = t0 + share.token;
      if (share.any && t < chunk.end) finish<T>(shared, now, p, at, share, chunk.batch, t);
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

// Calls body(layout{}). Up to 16 states: whole channels where their blocks are two a multiprocessor; else over as few threads a
// channel as there are channels for, measured on an H200. Over 2: two blocks run at once, so not where these would be followed
// by a few more, and not in float32, of which two do not fit. Over 4 where that makes two a multiprocessor, or where those over
// 8 do not run at once, else over 8, but with fewer channels whole ones in chunks are faster, unless sequences are too short
// for many chunks. Up to 64 states: over 4 threads where there are channels for it, else a Tiling, in chunks.
template <class Body>
void with_layout(const Scan& args, const char* function, Body&& body) {
  const std::int64_t states = args.A.size[1], sequences = effcore::scan::sequences(args.x, args.offsets);
  const std::int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, function);
  constexpr std::int64_t reserved = 1024;  // of a multiprocessor's shared memory, for each block
  const std::int64_t memory = shared_memory_limit(function) + reserved;
  const auto fill = [&](std::int64_t block_channels) {  // blocks a multiprocessor
    return static_cast<double>(ceil_div(args.x.size[2], block_channels) * sequences) / static_cast<double>(processors);
  };
  const auto fits = [&]<class L>(L, std::int64_t blocks) {  // on one multiprocessor
    constexpr std::int64_t bytes = sizeof(SpreadShared<bf16, L>), float_bytes = sizeof(SpreadShared<float, L>);
    return args.keep % L::tokens == 0 && blocks * (reserved + (args.x.dtype == DType::float32 ? float_bytes : bytes)) <= memory;
  };
  if (states > Tiling<4>::padded) return body(Tiling<16>{});
  if (states > Whole::padded) {
    if (fill(Spread<4, 64>::block_channels) >= 1.9 && fits(Spread<4, 64>{}, 1)) return body(Spread<4, 64>{});
    return body(Tiling<4>{});
  }
  if (fill(Whole::block_channels) >= 1.9) return body(Whole{});
  const double over_2 = fill(Spread<2>::block_channels), over_8 = fill(Spread<8>::block_channels);
  if (over_2 >= 1.5 && over_2 - (std::ceil(over_2) - 1) > 2.0 / 3 && fits(Spread<2>{}, 2)) return body(Spread<2>{});
  const bool at_once = over_8 <= 2 || fits(Spread<8>{}, 3);
  if ((fill(Spread<4>::block_channels) >= 1.9 || !at_once) && fits(Spread<4>{}, 1)) return body(Spread<4>{});
  const int few = over_8 >= 0.9 ? 3072 : 1024;  // tokens of a sequence that chunks do not pay for
  const bool is_short = args.x.size[0] * args.x.size[1] <= few * sequences;
  if (is_short && over_8 <= 1 && fits(Spread<8, 16, 3>{}, 1)) return body(Spread<8, 16, 3>{});
  if ((is_short || over_8 >= 1.5) && fits(Spread<8>{}, 1)) return body(Spread<8>{});
  body(Whole{});
}

ScanParams forward_params(const Scan& args, const char* function) {
  ScanParams p;
  with_layout(args, function, [&]<class L>(L) { p = params_of<L>(args, resident<L>, fills<L>, function); });
  return p;
}

template <class T, class L, bool outputs>
void launch_pass(const char* f, const ScanParams& p, cudaStream_t stream) {
  const unsigned blocks = grid(p.chunks.rows * ceil_div(p.channels, L::block_channels), f);
  if constexpr (std::is_same_v<L, Whole>)
    launch(f, channel_kernel<T, L, outputs>, blocks, threads, warps * sizeof(Lane<T, L>), stream, p);
  else if constexpr (fills<L> == 0)
    launch(f, spread_kernel<T, L>, blocks, L::block_threads, sizeof(SpreadShared<T, L>), stream, p);
  else
    launch(f, scan_kernel<T, L, outputs>, blocks, threads, sizeof(Shared<L>), stream, p);
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
    with_layout(args, f, [&]<class L>(L) {
      if (!p.single) {
        if constexpr (fills<L> > 0) launch_pass<T, L, false>(f, p, stream);
        launch(f, carry_kernel<T, false>, grid(ceil_div(p.chunks.sequences * pairs, threads), f), threads, 0, stream, p);
      }
      launch_pass<T, L, true>(f, p, stream);
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
