// The forward of the selective scan for few channels: up to 16 states over 4 or 8 threads of a warp, up to 64 over 4.
//
// A sequence can be gone through once, at N + 3 special functions a token and channel, or cut into chunks and gone through
// twice, at 2 N + 4. Where spreading channels over threads makes enough warps, it does so at less. What it costs are values
// that several threads need: a token's step size and input, made by one of a channel's threads, and its output, the sum over
// all of them. They go through shared memory for 16 tokens at once: four tokens' steps are one read, and so are a thread's
// values of B or C of a token.
//
// A turn of the loop works on a tile, makes the steps and inputs of the next one and ends the outputs of the one before. With 8
// threads a channel there may be one warp a scheduler, and nothing but the warp itself hides what it waits for: there all reads
// of shared memory stand before all writes, so that none waits for another (`early`: the other order, in fewer registers).
#pragma once
#include "common/tile.cuh"
#include "scan/tiles.cuh"

namespace effcore::cuda::scan {

template <int split_, int padded_ = 16>
struct Spread {
  static constexpr bool early = split_ == 4;
  static constexpr int split = split_, padded = padded_, tokens = 16;
  static constexpr int states = padded / split, channels = 32 / split;  // of a thread; of a warp
  static constexpr int block_channels = warps * channels;
  static constexpr int part = 2 * states + (states == 16 ? 4 : 0);  // floats of a thread's B and C of a token, apart in banks
  static constexpr int resident = split == 8 ? 2 : padded == 16 ? 4 : 3;  // blocks of a multiprocessor
  static constexpr int ahead = split == 8 ? 2 : 1;   // tiles on their way: with few warps one is not enough
  static constexpr int stages = split == 8 ? 8 : 4;  // a power of two, of at least 3 + ahead
  static constexpr int own = tokens / split;         // tokens of a tile that a thread prepares and ends, of its channel
};

template <class T, class L>
struct alignas(16) SpreadShared {
  static constexpr int run = 16 / sizeof(T);
  // Where 4 threads share a channel, rows of a thread's tokens stand apart from those of the next one's, so that they meet in
  // no bank; where 8 do, each row from the next.
  struct Rows {
    static constexpr int row = L::block_channels + (L::split == 4 ? 0 : run), gap = L::split == 4 ? 2 * run : 0;
    T at[L::tokens * row + L::split * gap];

    __device__ static constexpr int place(int token, int column) { return token * row + token / L::own * gap + column; }
    __device__ __forceinline__ T& operator()(int token, int column) { return at[place(token, column)]; }
    __device__ __forceinline__ const T& operator()(int token, int column) const { return at[place(token, column)]; }
  };
  struct Stage {
    Rows rows[3];                       // x, dt, z
    T states[2][L::tokens][L::padded];  // B, C
  };
  // A channel's tokens: neither the threads that write them nor those that read a token of 4 or 8 channels meet in a bank.
  struct Tokens {
    float at[L::channels * (L::tokens + 4)];

    __device__ __forceinline__ float* operator()(int channel, int token) {
      return &at[channel * L::tokens + (L::split == 4 ? channel / 2 : channel) * 4 + token];
    }
  };
  struct Warp {
    Tokens steps, inputs;
    float parts[L::channels]
               [L::split * (L::tokens + 4) + (L::own == 2 ? 16 : 0)];  // of the outputs, a thread's 16 tokens in a row
  };
  Stage stages[L::stages];                         // of tiles that are ended, worked on, made, and on their way
  float states[2][L::tokens][L::split * L::part];  // of a token: a thread's B and then its C, thread after thread
  Rows out[2];
  Warp warp[warps];
};

// What a thread brings of each tile to shared memory: runs of 16 bytes of x, dt, z, B and C, every fourth warpful of them.
template <class T, class L>
struct StageRuns {
  using Memory = SpreadShared<T, L>;
  static constexpr int run = Memory::run, of_row = L::block_channels / run, of_states = L::padded / run;
  static constexpr int quantity = L::tokens * of_row / 32, states = L::tokens * of_states / 32;  // warpfuls of each
  static constexpr int all = 3 * quantity + 2 * states, mine = (all + warps - 1) / warps;
  static_assert(quantity * 32 == L::tokens * of_row && states * 32 == L::tokens * of_states);
  const char* at[mine];  // in the tile to come
  std::int64_t tile[mine];
  int place[mine], row[mine];  // elements in a stage; the tile's token, or `none`
  int first;
  bool vector;
  static constexpr int none = 1 << 30;

  __device__ __forceinline__ StageRuns(const ScanParams& p, bool gated, int first, std::int64_t b, int t)
      : first(first), vector(p.vector && p.vector_states) {
#pragma unroll
    for (int i = 0; i < mine; ++i) {
      const Job job(i);
      const Rows& from = job.state ? (job.which == 0 ? p.B : p.C) : job.which == 0 ? p.x : job.which == 1 ? p.dt : p.z;
      const bool any = job.exists() && job.left(p, first) > 0 && (job.state || job.which < 2 || gated);
      row[i] = any ? job.row : none, tile[i] = L::tokens * from.token;
      constexpr int size = sizeof(typename Memory::Rows) / sizeof(T);
      place[i] = job.state ? 3 * size + (job.which * L::tokens + job.row) * L::padded + job.column
                           : job.which * size + Memory::Rows::place(job.row, job.column);
      at[i] = any ? from(b, t + job.row) + (job.column + (job.state ? 0 : first)) * std::int64_t{sizeof(T)} : p.x.data;
    }
  }

  // tokens: left in the chunk; what lies behind them, or behind the row, is 0
  __device__ __forceinline__ void load(typename Memory::Stage& stage, const ScanParams& p, int tokens) {
    T* base = stage.rows[0].at;
#pragma unroll
    for (int i = 0; i < mine; ++i) {
      if (all % warps != 0 && i == mine - 1 && !Job(i).exists()) break;
      const bool any = row[i] < tokens;
      if (vector)
        async_copy_16(shared_address(base + place[i]), at[i], any);
      else
        *reinterpret_cast<Run<T, run>*>(base + place[i]) =
            load_run<run>(reinterpret_cast<const T*>(at[i]), 0, any ? Job(i).left(p, first) : 0, false);
      at[i] += tile[i];
    }
    async_commit();
  }

 private:
  struct Job {
    bool state;
    int number, which, row, column;  // which: of x, dt, z, or of B, C
    __device__ __forceinline__ explicit Job(int i) {
      number = threadIdx.x / 32 + i * warps, state = number >= 3 * quantity;
      which = state ? (number - 3 * quantity) / states : number / quantity;
      const int k = (state ? (number - 3 * quantity) % states : number % quantity) * 32 + threadIdx.x % 32;
      const int of = state ? of_states : of_row;
      row = k / of, column = k % of * run;
    }
    __device__ __forceinline__ bool exists() const { return number < all; }
    __device__ __forceinline__ int left(const ScanParams& p, int first) const {
      return (state ? p.states : p.channels - first) - column;
    }
  };
};

// Sequences are not cut: p.single.
template <class T, class L>
__global__ void __launch_bounds__(threads, L::resident) spread_kernel(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) char memory[];
  using Memory = SpreadShared<T, L>;
  constexpr int tokens = L::tokens, own = L::own, states = L::states, run = Memory::run;
  auto& shared = *reinterpret_cast<Memory*>(memory);
  // A channel and its neighbour are neighbouring lanes, so that these read the same values of B and C: one access for both.
  const int lane = threadIdx.x % 32, part = lane / 2 % L::split, mine = lane / (2 * L::split) * 2 + lane % 2,
            token = part * own;
  auto& warp = shared.warp[threadIdx.x / 32];
  const int blocks = (p.channels + L::block_channels - 1) / L::block_channels, chunk_row = blockIdx.x / blocks;
  const int first = blockIdx.x % blocks * L::block_channels, column = threadIdx.x / 32 * L::channels + mine, c = first + column;
  Chunks::Chunk chunk;
  if (!p.chunks.find(chunk_row, chunk)) return;
  const bool exists = c < p.channels, gated = p.z.data != nullptr;
  const int count = exists ? min(max(p.states - part * states, 0), states) : 0;  // of this thread's states
  const int length = chunk.end - chunk.begin;

  using Runs = StageRuns<T, L>;
  Runs runs(p, gated, first, chunk.batch, chunk.begin);
#pragma unroll
  for (int k = 0; k <= L::ahead; ++k) runs.load(shared.stages[k], p, length - k * tokens);

  const float bias = exists && p.bias.data != nullptr ? p.bias.at<T>(c) : 0.0f;
  const float D = exists && p.D.data != nullptr ? p.D.at<T>(c) : 0.0f;
  float A[states], h[states];
#pragma unroll
  for (int n = 0; n < states; ++n) {
    A[n] = n < count ? fmaxf(p.A.at<T>(c, part * states + n) * log2_e, -FLT_MAX) : 0.0f;
    h[n] = 0.0f;
    if (n < count && p.entering != nullptr)
      h[n] = p.entering[(std::int64_t{chunk.sequence} * p.channels + c) * p.states + part * states + n];
  }

  // What this thread makes of its tokens of a tile.
  struct Made {
    float step[own], input[own];
  };
  const auto make = [&](Made& made, const typename Memory::Stage& stage, int left) {
#pragma unroll
    for (int u = 0; u < own; ++u) {
      const float value = to_float(stage.rows[0](token + u, column)), sum = to_float(stage.rows[1](token + u, column)) + bias;
      made.step[u] = select(p.softplus, softplus_of<T>(sum), sum);
      if (token + u >= left) made.step[u] = 0.0f;  // leaves the state as it is
      made.input[u] = made.step[u] * value;
    }
  };
  const auto put = [&](const Made& made) {
    store_floats(warp.steps(mine, token), made.step);
    store_floats(warp.inputs(mine, token), made.input);
  };
  // B and C of a tile as floats: four states of a token of one of them at a time.
  constexpr int state_runs = L::padded / 4, converted = tokens * 2 * state_runs / threads;
  using States = Run<T, 4>[converted];
  const auto load_states = [&](States& held, const typename Memory::Stage& stage) {
#pragma unroll
    for (int i = 0; i < converted; ++i) {
      const int r = threadIdx.x + i * threads;
      held[i] =
          *reinterpret_cast<const Run<T, 4>*>(&stage.states[r / state_runs % 2][r / (2 * state_runs)][r % state_runs * 4]);
    }
  };
  const auto put_states = [&](const States& held, int turn) {
#pragma unroll
    for (int i = 0; i < converted; ++i) {
      const int r = threadIdx.x + i * threads, state = r % state_runs * 4;
      float* to = shared.states[turn][r / (2 * state_runs)] + r / state_runs % 2 * states;
      if constexpr (states == 2) {
        const float low[2] = {held[i][0], held[i][1]}, high[2] = {held[i][2], held[i][3]};
        store_floats(to + state / 2 * L::part, low), store_floats(to + (state / 2 + 1) * L::part, high);
      } else {
        const float v[4] = {held[i][0], held[i][1], held[i][2], held[i][3]};
        store_floats(to + state / states * L::part + state % states, v);
      }
    }
  };
  // The outputs of this thread's tokens of a tile, from what all of the channel's threads left of it.
  const auto end = [&](float (&y)[own], const typename Memory::Stage& stage) {
    load_floats(y, &warp.parts[mine][token]);
#pragma unroll
    for (int q = 1; q < L::split; ++q) {
      float other[own];
      load_floats(other, &warp.parts[mine][q * (tokens + 4) + token]);
#pragma unroll
      for (int u = 0; u < own; ++u) y[u] += other[u];
    }
#pragma unroll
    for (int u = 0; u < own; ++u) {
      const float along = to_float(stage.rows[2](token + u, column));
      y[u] = (y[u] + D * to_float(stage.rows[0](token + u, column))) * select(gated, along * gate_sigmoid<T>(along), 1.0f);
    }
  };
  const auto put_outputs = [&](const float (&y)[own], int turn) {
#pragma unroll
    for (int u = 0; u < own; ++u) shared.out[turn](token + u, column) = from_float<T>(y[u]);
  };
  // Runs of outputs, by the warps that bring fewer rows.
  constexpr int of_row = L::block_channels / run, stored = tokens * of_row;
  static_assert(stored <= threads);
  const int out_run = (threadIdx.x / 32 + warps - Runs::all % warps) % warps * 32 + lane;
  const int out_row = out_run / of_row, out_column = out_run % of_row * run;
  const int out_left = out_run < stored ? p.channels - first - out_column : 0;
  char* out = p.out.data;
  if (out_left > 0) out = p.out(chunk.batch, chunk.begin + out_row) + (first + out_column) * std::int64_t{sizeof(T)};
  const auto store_outputs = [&](int k) {  // of tile k, tile after tile
    if (out_left <= 0 || out_row >= length - k * tokens) return;
    store_run(reinterpret_cast<T*>(out), *reinterpret_cast<const Run<T, run>*>(&shared.out[k % 2](out_row, out_column)), 0,
              out_left, p.vector);
    out += tokens * p.out.token;
  };

  const int tiles = (length + tokens - 1) / tokens;
  async_wait<L::ahead>();
  __syncthreads();
  {
    Made made;
    make(made, shared.stages[0], length);
    States inputs;
    load_states(inputs, shared.stages[0]);
    put(made), put_states(inputs, 0);
  }
  int keep_in = 0;       // tokens until states are kept
  float* kept = p.kept;  // [states][channels] of the next ones, this thread's part
  if (kept != nullptr) kept += (kept_row(p, chunk, chunk.begin) * p.states + part * states) * p.channels + c;
  for (int k = 0; k < tiles; ++k) {
    async_wait<L::ahead - 1>();
    __syncthreads();  // tile k is made, tile k + 1 is there, the outputs of tile k - 2 are
    const auto& next = shared.stages[(k + 1) % L::stages];
    const int left = length - (k + 1) * tokens;
    if (kept != nullptr) {
      if (keep_in == 0) {
#pragma unroll
        for (int n = 0; n < states; ++n)
          if (n < count) kept[std::int64_t{n} * p.channels] = h[n];
        kept += std::int64_t{p.states} * p.channels, keep_in = p.keep;
      }
      keep_in -= tokens;
    }
    if (k >= 2) store_outputs(k - 2);
    runs.load(shared.stages[(k + 1 + L::ahead) % L::stages], p, left - L::ahead * tokens);

    Made made;
    float y[tokens], ended[own];
    States inputs;
    load_states(inputs, next);
    end(ended, shared.stages[(k + L::stages - 1) % L::stages]);
    if constexpr (!L::early) make(made, next, left);
    if constexpr (L::early) {
      put_outputs(ended, (k + 1) % 2);
      __syncwarp();
    }
#pragma unroll
    for (int i0 = 0; i0 < tokens; i0 += 4) {
      float step[4], input[4];
      load_floats(step, warp.steps(mine, i0));
      load_floats(input, warp.inputs(mine, i0));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* both = &shared.states[k % 2][i0 + i][part * L::part];
        constexpr int sums = states == 16 ? 2 : 1;  // so that little waits for the sum before it
        float sum[sums];
#pragma unroll
        for (int n0 = 0; n0 < states; n0 += 4) {
          float from[4], to[4];
          load_floats(from, both + n0);
          if constexpr (states == 2)
            to[0] = from[2], to[1] = from[3];
          else
            load_floats(to, both + states + n0);
#pragma unroll
          for (int n = 0; n < min(states, 4); ++n) {
            h[n0 + n] = decay(step[i], A[n0 + n]) * h[n0 + n] + input[i] * from[n];
            float& own_sum = sum[n % sums];
            own_sum = n0 + n < sums ? h[n0 + n] * to[n] : own_sum + h[n0 + n] * to[n];
          }
        }
        y[i0 + i] = sums == 1 ? sum[0] : sum[0] + sum[sums - 1];
      }
      if constexpr (L::early) {
        const float four[4] = {y[i0], y[i0 + 1], y[i0 + 2], y[i0 + 3]};
        store_floats(&warp.parts[mine][part * (tokens + 4) + i0], four);
      }
    }
    if constexpr (L::early) make(made, next, left);
    __syncwarp();
    put(made), put_states(inputs, (k + 1) % 2);
    if constexpr (!L::early) {
#pragma unroll
      for (int i0 = 0; i0 < tokens; i0 += 4) {
        const float four[4] = {y[i0], y[i0 + 1], y[i0 + 2], y[i0 + 3]};
        store_floats(&warp.parts[mine][part * (tokens + 4) + i0], four);
      }
      put_outputs(ended, (k + 1) % 2);
    }
  }
  async_wait<0>();
  if (tiles > 0) {
    __syncthreads();
    if (tiles >= 2) store_outputs(tiles - 2);
    float ended[own];
    end(ended, shared.stages[(tiles - 1) % L::stages]);
    put_outputs(ended, (tiles - 1) % 2);
    __syncthreads();
    store_outputs(tiles - 1);
  }
  if (!exists) return;
  const bool vectors = p.states % states == 0 && reinterpret_cast<std::uintptr_t>(p.leaving) % 16 == 0;
  store_run(p.leaving + (std::int64_t{chunk.sequence} * p.channels + c) * p.states, Run<float, states>::of(h), part * states,
            p.states, vectors);
}

}  // namespace effcore::cuda::scan
