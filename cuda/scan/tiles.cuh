// How a block of four warps goes through a chunk of a selective scan: tiles of 8 tokens, each thread on 16 pairs of a channel
// and a state.
//
// A thread holds 4 channels by 4 states (2 by 8 where there are more than 64 states): so a token's step size, x and so on, of 4
// channels, serve 4 states, its B and C, of 4 states, serve 4 channels, and sums over states and over channels begin
// within the thread. Neighbouring lanes hold neighbouring states; 4, 16 or 32 lanes share their channels.
//
// What a channel needs of a token is prepared once a tile, one token and up to 8 neighbouring channels a lane, and lies in
// shared memory as floats, B and C beside it. Behind the last channel, state or token stand zeros.
#pragma once
#include <cfloat>

#include "scan/scan.cuh"

namespace effcore::cuda::scan {

constexpr int warps = threads / 32, thread_pairs = 16;

template <int parts_>
struct Tiling {
  static constexpr int parts = parts_;
  static constexpr int state_lanes = parts == 1 ? 4 : parts == 4 ? 16 : 32;
  static constexpr int channels = parts == 16 ? 2 : 4, states = thread_pairs / channels;  // of a thread
  static constexpr int channel_lanes = 32 / state_lanes;
  static constexpr int padded = state_lanes * states;                     // 16, 64, 256
  static constexpr int warp_channels = channel_lanes * channels;          // 32, 8, 2
  static constexpr int block_channels = warps * warp_channels;            // 128, 32, 8
  static constexpr int run = warp_channels >= 4 ? warp_channels / 4 : 1;  // channels of one token that a lane prepares
  static constexpr bool all_share = tile * warp_channels == 32 * run;     // whether every lane prepares something
  static_assert(tile * warp_channels <= 32 * run);
};

// Calls body(Tiling<...>{}) with the tiling for so many states.
template <class Body>
void with_tiling(std::int64_t states, Body&& body) {
  if (states <= Tiling<1>::padded)
    body(Tiling<1>{});
  else if (states <= Tiling<4>::padded)
    body(Tiling<4>{});
  else
    body(Tiling<16>{});
}
inline std::int64_t channel_blocks(std::int64_t channels, std::int64_t states) {
  std::int64_t blocks = 0;
  with_tiling(states, [&]<class L>(L) { blocks = ceil_div(channels, L::block_channels); });
  return blocks;
}

// This thread's pairs, and its part in the sums.
template <class L>
struct Place {
  static constexpr int sharing = L::state_lanes / L::channels;  // lanes that end with the sum of the same channel
  int warp, lane, block, blocks, row;
  int warp_first, first, state;  // the warp's first channel, the thread's first channel and state
  int own, c;                    // the channel whose sums over states end here: in the warp, and of all
  bool writes;                   // whether this lane writes them

  __device__ explicit Place(const ScanParams& p) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    blocks = (p.channels + L::block_channels - 1) / L::block_channels;
    block = blockIdx.x % blocks, row = blockIdx.x / blocks;
    warp_first = block * L::block_channels + warp * L::warp_channels;
    const int channel_lane = lane / L::state_lanes, state_lane = lane % L::state_lanes;
    first = warp_first + channel_lane * L::channels;
    state = state_lane * L::states;
    own = channel_lane * L::channels + state_lane / sharing;
    c = warp_first + own;
    writes = state_lane % sharing == 0 && c < p.channels;
  }
  __device__ int channel_in_warp() const { return lane / L::state_lanes * L::channels; }
};

// ---------------------------------------------------------------- floats of shared memory, matrices of states

template <int n>
__device__ __forceinline__ void load_floats(float (&to)[n], const float* from) {
  const auto run = *reinterpret_cast<const Run<float, n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = run[i];
}
template <int n>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[n]) {
  *reinterpret_cast<Run<float, n>*>(to) = Run<float, n>::of(from);
}

// The thread's pairs of a [states][channels] matrix. A pair's place is state * channels + channel.
template <class L>
__device__ __forceinline__ void load_pairs(float (&to)[thread_pairs], const float* matrix, const ScanParams& p,
                                           const Place<L>& at) {
  Run<float, L::channels> runs[L::states];
#pragma unroll
  for (int j = 0; j < L::states; ++j) {
    runs[j] = {};
    if (at.state + j < p.states)
      runs[j] = load_run<L::channels>(matrix + std::int64_t{at.state + j} * p.channels, at.first, p.channels, p.vector);
  }
#pragma unroll
  for (int e = 0; e < thread_pairs; ++e) to[e] = runs[e / L::channels][e % L::channels];
}
template <class L>
__device__ __forceinline__ void store_pairs(float* matrix, const float (&from)[thread_pairs], const ScanParams& p,
                                            const Place<L>& at) {
#pragma unroll
  for (int j = 0; j < L::states; ++j) {
    if (at.state + j >= p.states) break;
    float row[L::channels];
#pragma unroll
    for (int i = 0; i < L::channels; ++i) row[i] = from[j * L::channels + i];
    store_run(matrix + std::int64_t{at.state + j} * p.channels, Run<float, L::channels>::of(row), at.first, p.channels,
              p.vector);
  }
}

// Calls body(pair, channel, state) for those that exist.
template <class L, class Body>
__device__ __forceinline__ void each_pair(const ScanParams& p, const Place<L>& at, Body&& body) {
#pragma unroll
  for (int e = 0; e < thread_pairs; ++e) {
    const int c = at.first + e % L::channels, n = at.state + e / L::channels;
    if (c < p.channels && n < p.states) body(e, c, n);
  }
}

// A in base 2; zeros in the padding, so that its states stay what they are. Finite, so that a step of 0 leaves a state as it
// is.
template <class T, class L>
__device__ __forceinline__ void load_rates(float (&A)[thread_pairs], const ScanParams& p, const Place<L>& at) {
#pragma unroll
  for (int e = 0; e < thread_pairs; ++e) A[e] = 0.0f;
  each_pair(p, at, [&](int e, int c, int n) {
    const float rate = p.A.at<T>(c, n) * log2_e;
    A[e] = rate < -FLT_MAX ? -FLT_MAX : rate;
  });
}

// The state that enters a chunk: carried, or the sequence's own.
template <class L>
__device__ __forceinline__ void load_entering(float (&h)[thread_pairs], const ScanParams& p, const Place<L>& at, int s) {
  if (!p.single) return load_pairs(h, p.carried + std::int64_t{at.row} * p.states * p.channels, p, at);
#pragma unroll
  for (int e = 0; e < thread_pairs; ++e) h[e] = 0.0f;
  if (p.entering != nullptr)
    each_pair(p, at, [&](int e, int c, int n) { h[e] = p.entering[(std::int64_t{s} * p.channels + c) * p.states + n]; });
}
template <class L>
__device__ __forceinline__ void store_leaving(const float (&h)[thread_pairs], const ScanParams& p, const Place<L>& at, int s) {
  const bool vectors = p.states % L::states == 0 && reinterpret_cast<std::uintptr_t>(p.leaving) % 16 == 0;
#pragma unroll
  for (int k = 0; k < L::channels; ++k) {
    if (at.first + k >= p.channels) break;
    float states[L::states];
#pragma unroll
    for (int j = 0; j < L::states; ++j) states[j] = h[j * L::channels + k];
    store_run(p.leaving + (std::int64_t{s} * p.channels + at.first + k) * p.states, Run<float, L::states>::of(states), at.state,
              p.states, vectors);
  }
}

// ---------------------------------------------------------------- a tile in shared memory

// Tokens of one quantity: [tile][block_channels], a warp's channels next to each other.
template <class L>
struct Channels {
  float at[tile][warps][L::warp_channels];
};
template <class L>
struct States {
  float at[tile][L::padded];
};

// B or C of a tile, on its way from global to shared memory.
template <class T, class L>
struct StatesLoad {
  T held[L::parts];
  StatesLoad() = default;
  __device__ __forceinline__ StatesLoad(const Rows& rows, std::int64_t b, int t0, int end, int states) {
#pragma unroll
    for (int k = 0; k < L::parts; ++k) {
      const int i = threadIdx.x + k * threads, t = t0 + i / L::padded, n = i % L::padded;
      held[k] = t < end && n < states ? reinterpret_cast<const T*>(rows(b, t))[n] : from_float<T>(0.0f);
    }
  }
  __device__ __forceinline__ void put(States<L>& to) const {
#pragma unroll
    for (int k = 0; k < L::parts; ++k) (&to.at[0][0])[threadIdx.x + k * threads] = to_float(held[k]);
  }
};

// The token of a tile, and the run of the warp's channels, that this lane prepares.
template <class L>
struct Share {
  int token, channel;
  bool any;
  __device__ explicit Share(int lane) {
    constexpr int lanes = L::warp_channels / L::run;  // of a token
    token = lane / lanes, channel = lane % lanes * L::run;
    any = token < tile;
  }
};
template <class T, class L>
__device__ __forceinline__ Run<T, L::run> load_share(const Rows& rows, const ScanParams& p, const Place<L>& at,
                                                     const Share<L>& share, std::int64_t b, int t0, int end) {
  Run<T, L::run> run{};
  const int t = t0 + share.token;
  if (share.any && t < end && rows.data != nullptr)
    run = load_run<L::run>(reinterpret_cast<const T*>(rows(b, t)), at.warp_first + share.channel, p.channels, p.vector);
  return run;
}

// A parameter of a warp's channels; zeros where there is none.
template <class L>
struct PerChannel {
  float at[warps][L::warp_channels];

  template <class T>
  __device__ __forceinline__ void fill(const Parameter& parameter, const ScanParams& p, const Place<L>& place) {
    const int c = place.warp_first + place.lane;
    if (place.lane < L::warp_channels)
      at[place.warp][place.lane] = parameter.data != nullptr && c < p.channels ? parameter.at<T>(c) : 0.0f;
  }
};

// The step sizes of this lane's share; 0 behind the last token.
template <class T, class L>
__device__ __forceinline__ void put_steps(float (&steps)[L::run], Channels<L>& to, const Run<T, L::run>& dt,
                                          const PerChannel<L>& bias, const ScanParams& p, const Place<L>& at,
                                          const Share<L>& share, int tokens) {
  load_floats(steps, &bias.at[at.warp][share.channel]);
#pragma unroll
  for (int i = 0; i < L::run; ++i) steps[i] += dt[i];
  if (p.softplus) {
#pragma unroll
    for (int i = 0; i < L::run; ++i) steps[i] = softplus(steps[i]);
  }
  if (share.token >= tokens) {
#pragma unroll
    for (int i = 0; i < L::run; ++i) steps[i] = 0.0f;
  }
  store_floats(&to.at[share.token][at.warp][share.channel], steps);
}

// ---------------------------------------------------------------- sums over lanes

// Sums v over the `lanes` lanes that differ in the bits stride, 2 stride, ... Each step sends half of what is left to the lane
// across and adds what comes back, down to `least` values, which lane l has from v[index * least] on, where index is
// the upper bits of l / stride % lanes; from there on all lanes across get the same sums.
template <int least, int lanes, int stride, int values>
__device__ __forceinline__ void sum_lanes(float (&v)[values], int lane) {
  if constexpr (lanes > 1) {
    constexpr int bit = stride * lanes / 2;
    if constexpr (values > least) {
      const bool upper = lane & bit;
      float half[values / 2];
#pragma unroll
      for (int i = 0; i < values / 2; ++i) {
        const float send = upper ? v[i] : v[i + values / 2], keep = upper ? v[i + values / 2] : v[i];
        half[i] = keep + __shfl_xor_sync(~0u, send, bit);
      }
      sum_lanes<least, lanes / 2, stride>(half, lane);
#pragma unroll
      for (int i = 0; i < values / 2; ++i) v[i] = half[i];
    } else {
#pragma unroll
      for (int i = 0; i < values; ++i) v[i] += __shfl_xor_sync(~0u, v[i], bit);
      sum_lanes<least, lanes / 2, stride>(v, lane);
    }
  }
}

}  // namespace effcore::cuda::scan
