// The forward of the selective scan for few channels: up to 16 states over 2, 4 or 8 threads of a warp, up to 64 over 4.
//
// A sequence can be gone through once, at N + 3 special functions a token and channel, or cut into chunks and gone through
// twice, at 2 N + 4. Where spreading channels over threads makes enough warps, it does so at less. What it costs are values
// that several threads need: a token's step size and input, made by one thread, and its output, the sum over a channel's
// threads. They go through shared memory for 16 tokens at once: four tokens' steps are one read, and so are a thread's values
// of B or C of a token.
//
// Such channels make one or two warps a scheduler, which would wait for themselves. So half of a block's warps go through the
// states of a tile, while the other half makes the steps and inputs of the next one and ends the outputs of the one before
// (or, in three roles, a third each); they meet once a tile. As all this goes through shared memory anyway, it takes no more
// accesses, and hardly more instructions, than warps that do both.
#pragma once
#include "common/tile.cuh"
#include "scan/tiles.cuh"

namespace effcore::cuda::scan {

// This thread among those of its role. (By a remainder it would be the same, but then the compiler of CUDA 13.0 crashes.)
__device__ __forceinline__ int role_thread() {
  return threadIdx.x - (threadIdx.x < threads ? 0 : threadIdx.x < 2 * threads ? threads : 2 * threads);
}

// roles: the states and the tokens; or 3, tokens that are prepared and those that end apart, faster where a multiprocessor has
// one block.
template <int split_, int padded_ = 16, int roles_ = 2>
struct Spread {
  static constexpr int split = split_, padded = padded_, roles = roles_, tokens = 16;
  static constexpr int states = padded / split, channels = 32 / split;  // of a thread; of a warp
  static constexpr int block_channels = warps * channels, block_threads = roles * threads;
  static constexpr int part = 2 * states + (states == 16 ? 4 : 0);  // floats of a thread's B and C of a token, apart in banks
  static constexpr int resident = roles == 3 || split == 2 || states == 16 ? 2 : 3;  // blocks of a multiprocessor
  static constexpr int ahead = split == 8 ? 2 : 1;   // tiles on their way: with few warps one is not enough
  static constexpr int stages = split == 8 ? 8 : 4;  // a power of two, of at least 3 + ahead
  // What a thread prepares and ends of a tile: tokens that follow each other, of channels 8 apart.
  static constexpr int own_channels = split == 2 ? 2 : 1, own = tokens / split / own_channels;
};

// Whether 8 channels of a tile go between shared memory and registers as two matrices of 8 tokens each, transposed on the way.
template <class T, class L>
constexpr bool by_matrices = sizeof(T) == 2 && L::channels >= 8;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool stores_matrices = false;  // there they can be loaded only
#else
constexpr bool stores_matrices = true;
#endif

template <class T, class L>
struct alignas(16) SpreadShared {
  static constexpr int run = 16 / sizeof(T);
  // Rows, and those of four tokens, stand so far apart that neither matrices' rows nor the threads' tokens meet in a bank.
  struct Rows {
    static constexpr int row = L::block_channels + (L::split == 4 ? 0 : run);
    static constexpr int gap = L::split == 8 ? 0 : L::split == 4 && by_matrices<T, L> ? run : 2 * run;
    T at[L::tokens * row + L::tokens / 4 * gap];

    __device__ static constexpr int place(int token, int column) { return token * row + token / 4 * gap + column; }
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
      return &at[channel * L::tokens + (L::split == 8 ? channel : channel / 2) * 4 + token];
    }
  };
  // Of the outputs, a thread's tokens in a row. Neither those that write four tokens nor those that read them meet in a bank.
  struct Parts {
    static constexpr int thread = L::tokens + 4, pair = L::split == 2 ? 8 : 0;  // pair: between two channels and the next two
    static constexpr int channel = L::split * thread + (L::split == 2 ? 8 : L::split == 4 ? 0 : 16);
    float at[L::channels * channel + L::channels / 2 * pair];

    __device__ __forceinline__ float* operator()(int c, int part, int token) {
      return &at[c * channel + c / 2 * pair + part * thread + token];
    }
  };
  struct Warp {
    Tokens steps, inputs;
    Parts parts;
  };
  Stage stages[L::stages];                         // of tiles that are ended, worked on, made, and on their way
  float states[2][L::tokens][L::split * L::part];  // of a token: a thread's B and then its C, thread after thread
  Rows out[2];
  Warp warp[2][warps];  // of tiles by turns

  __device__ __forceinline__ Warp& of_tile(int k) { return warp[k & 1][role_thread() / 32]; }
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
      number = role_thread() / 32 + i * warps, state = number >= 3 * quantity;
      which = state ? (number - 3 * quantity) / states : number / quantity;
      const int k = (state ? (number - 3 * quantity) % states : number % quantity) * 32 + role_thread() % 32;
      const int of = state ? of_states : of_row;
      row = k / of, column = k % of * run;
    }
    __device__ __forceinline__ bool exists() const { return number < all; }
    __device__ __forceinline__ int left(const ScanParams& p, int first) const {
      return (state ? p.states : p.channels - first) - column;
    }
  };
};

// x and dt, or z and x, of the tokens that a thread owns. Matrices reach the threads in this very order if a lane's address is
// that of a row for this lane; lanes from 16 on are for the second one.
template <class T, class L>
struct OwnTokens {
  using Rows = typename SpreadShared<T, L>::Rows;
  using Values = float[L::own_channels][L::own];
  static constexpr int lanes = L::tokens / L::own;  // of a channel
  int channel, token, column;                       // channel: in the warp, the first; column: in the block
  int place;                                        // bytes to the matrices' row that this lane addresses

  __device__ __forceinline__ OwnTokens(int warp, int lane)
      : channel(lane / lanes),
        token(lane % lanes * L::own),
        column(warp * L::channels + channel),
        place(Rows::place(lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2, warp * L::channels) * static_cast<int>(sizeof(T))) {}

  __device__ __forceinline__ void load(Values& a, Values& b, const Rows& of_a, const Rows& of_b) const {
#pragma unroll
    for (int j = 0; j < L::own_channels; ++j) {
      if constexpr (by_matrices<T, L>) {
        std::uint32_t pairs[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                     : "r"(shared_address(role_thread() % 32 < 16 ? &of_a : &of_b) + place + j * 16));
#pragma unroll
        for (int u = 0; u < L::own; ++u)
          a[j][u] = half_of<T>(pairs[u / 2], u % 2), b[j][u] = half_of<T>(pairs[2 + u / 2], u % 2);
      } else {
#pragma unroll
        for (int u = 0; u < L::own; ++u)
          a[j][u] = to_float(of_a(token + u, column + 8 * j)), b[j][u] = to_float(of_b(token + u, column + 8 * j));
      }
    }
  }
  __device__ __forceinline__ void store(Rows& to, const Values& y) const {
#pragma unroll
    for (int j = 0; j < L::own_channels; ++j) {
      if constexpr (stores_matrices && by_matrices<T, L>) {
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(&to) + place + j * 16),
            "r"(pack<T>(y[j][0], y[j][1])), "r"(pack<T>(y[j][2], y[j][3]))
            : "memory");
      } else {
#pragma unroll
        for (int u = 0; u < L::own; ++u) to(token + u, column + 8 * j) = from_float<T>(y[j][u]);
      }
    }
  }
};

// A block's channels, from `first` on, in a chunk. All roles come to the same barriers.
template <class T, class L>
struct SpreadBlock {
  const ScanParams& p;
  SpreadShared<T, L>& shared;
  Chunks::Chunk chunk;
  int first, length, tiles;
};

// The states, and of the outputs each thread's part.
template <class T, class L>
__device__ __forceinline__ void spread_states(const SpreadBlock<T, L>& block) {
  const ScanParams& p = block.p;
  SpreadShared<T, L>& shared = block.shared;
  const Chunks::Chunk& chunk = block.chunk;
  const int first = block.first, tiles = block.tiles;
  constexpr int tokens = L::tokens, states = L::states;
  // A channel and its neighbour are neighbouring lanes, so that these read the same values of B and C: one access for both.
  const int lane = threadIdx.x % 32, part = lane / 2 % L::split, mine = lane / (2 * L::split) * 2 + lane % 2;
  const int c = first + role_thread() / 32 * L::channels + mine;
  // Of this thread's states, those that exist.
  const auto count_states = [&] { return c < p.channels ? min(max(p.states - part * states, 0), states) : 0; };
  float A[states], h[states];
  const int count = count_states();
#pragma unroll
  for (int n = 0; n < states; ++n) {
    A[n] = n < count ? fmaxf(p.A.at<T>(c, part * states + n) * log2_e, -FLT_MAX) : 0.0f;
    h[n] = 0.0f;
    if (n < count && p.entering != nullptr)
      h[n] = p.entering[(std::int64_t{chunk.sequence} * p.channels + c) * p.states + part * states + n];
  }
  __syncthreads();
  int keep_at = 0;  // the token before which states are kept
  for (int k = 0; k < tiles; ++k) {
    __syncthreads();  // tile k is made
    if (p.kept != nullptr && k * tokens == keep_at) {
      float* to = p.kept + (kept_row(p, chunk, chunk.begin + keep_at) * p.states + part * states) * p.channels + c;
#pragma unroll
      for (int n = 0; n < states; ++n)
        if (n < count_states()) to[std::int64_t{n} * p.channels] = h[n];
      keep_at += p.keep;
    }
    auto& warp = shared.of_tile(k);
    // Stored parts hold up all reads that follow. So 8 are held, and the next tokens' steps read before, where registers allow.
    constexpr bool holds = sizeof(T) == 2 && (states == 4 || states == 8 || L::roles == 3);
    float step[2][4], input[2][4], y[8];
    const auto load_steps = [&](int i0) {
      load_floats(step[i0 / 4 % 2], warp.steps(mine, i0));
      load_floats(input[i0 / 4 % 2], warp.inputs(mine, i0));
    };
    if constexpr (holds) load_steps(0);
#pragma unroll
    for (int i0 = 0; i0 < tokens; i0 += 4) {
      if (!holds || i0 + 4 < tokens) load_steps(holds ? i0 + 4 : i0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* both = &shared.states[k & 1][i0 + i][part * L::part];
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
            // An FMA of three registers takes two cycles of their banks, unless one was just read: here all states share one.
            h[n0 + n] = fmaf(input[i0 / 4 % 2][i], from[n], decay(step[i0 / 4 % 2][i], A[n0 + n]) * h[n0 + n]);
            float& own_sum = sum[n % sums];
            own_sum = n0 + n < sums ? h[n0 + n] * to[n] : fmaf(to[n], h[n0 + n], own_sum);
          }
        }
        y[i0 % 8 + i] = sums == 1 ? sum[0] : sum[0] + sum[sums - 1];
      }
      if (!holds || i0 % 8 == 4) {
#pragma unroll
        for (int back = holds ? 4 : 0; back >= 0; back -= 4) {
          const float* v = &y[(i0 - back) % 8];
          const float four[4] = {v[0], v[1], v[2], v[3]};
          store_floats(warp.parts(mine, part, i0 - back), four);
        }
      }
    }
  }
  if (tiles > 0) {
    __syncthreads();
    __syncthreads();
  }
  if (c >= p.channels) return;
  const bool vectors = p.states % states == 0 && reinterpret_cast<std::uintptr_t>(p.leaving) % 16 == 0;
  store_run(p.leaving + (std::int64_t{chunk.sequence} * p.channels + c) * p.states, Run<float, states>::of(h), part * states,
            p.states, vectors);
}

// All else. prepares: rows from memory, the steps, inputs, B and C of a tile. ends: outputs from their parts, and to memory.
template <bool prepares, bool ends, class T, class L>
__device__ __forceinline__ void spread_tokens(const SpreadBlock<T, L>& block) {
  const ScanParams& p = block.p;
  SpreadShared<T, L>& shared = block.shared;
  const Chunks::Chunk& chunk = block.chunk;
  const int first = block.first, tiles = block.tiles;
  using Memory = SpreadShared<T, L>;
  constexpr int tokens = L::tokens, own = L::own, own_channels = L::own_channels, states = L::states, run = Memory::run;
  const int length = block.length, lane = threadIdx.x % 32;
  const OwnTokens<T, L> own_tokens(role_thread() / 32, lane);
  const bool gated = p.z.data != nullptr;
  using Runs = StageRuns<T, L>;
  Runs runs(p, gated, first, chunk.batch, chunk.begin);
#pragma unroll
  for (int k = 0; k <= L::ahead; ++k)
    if constexpr (prepares) runs.load(shared.stages[k], p, length - k * tokens);

  float bias[own_channels], D[own_channels];
#pragma unroll
  for (int j = 0; j < own_channels; ++j) {
    const int of = first + own_tokens.column + 8 * j;
    bias[j] = of < p.channels && p.bias.data != nullptr ? p.bias.at<T>(of) : 0.0f;
    D[j] = of < p.channels && p.D.data != nullptr ? p.D.at<T>(of) : 0.0f;
  }
  // What this thread makes of its tokens of a tile.
  using Values = typename OwnTokens<T, L>::Values;
  struct Made {
    Values step, input;
  };
  const auto make = [&](Made& made, const typename Memory::Stage& stage, int left) {
    Values values;
    own_tokens.load(values, made.step, stage.rows[0], stage.rows[1]);
#pragma unroll
    for (int j = 0; j < own_channels; ++j) {
#pragma unroll
      for (int u = 0; u < own; ++u) {
        const float sum = made.step[j][u] + bias[j];
        // Steps behind the last token leave the state as it is.
        made.step[j][u] = select(own_tokens.token + u < left, select(p.softplus, softplus_of<T>(sum), sum), 0.0f);
        made.input[j][u] = made.step[j][u] * values[j][u];
      }
    }
  };
  const auto put = [&](const Made& made, int k) {
    auto& warp = shared.of_tile(k);
#pragma unroll
    for (int j = 0; j < own_channels; ++j) {
      store_floats(warp.steps(own_tokens.channel + 8 * j, own_tokens.token), made.step[j]);
      store_floats(warp.inputs(own_tokens.channel + 8 * j, own_tokens.token), made.input[j]);
    }
  };
  // B and C of a tile as floats: four states of a token of one of them at a time.
  constexpr int state_runs = L::padded / 4, converted = tokens * 2 * state_runs / threads;
  using States = Run<T, 4>[converted];
  const auto load_states = [&](States& held, const typename Memory::Stage& stage) {
#pragma unroll
    for (int i = 0; i < converted; ++i) {
      const int r = role_thread() + i * threads;
      held[i] =
          *reinterpret_cast<const Run<T, 4>*>(&stage.states[r / state_runs % 2][r / (2 * state_runs)][r % state_runs * 4]);
    }
  };
  const auto put_states = [&](const States& held, int turn) {
#pragma unroll
    for (int i = 0; i < converted; ++i) {
      const int r = role_thread() + i * threads, state = r % state_runs * 4, which = r / state_runs % 2;
      float* to = shared.states[turn][r / (2 * state_runs)];
      if constexpr (states == 2) {
        const float low[2] = {held[i][0], held[i][1]}, high[2] = {held[i][2], held[i][3]};
        store_floats(to + state / 2 * L::part + which * 2, low), store_floats(to + (state / 2 + 1) * L::part + which * 2, high);
      } else {
        const float v[4] = {held[i][0], held[i][1], held[i][2], held[i][3]};
        reinterpret_cast<Run<float, 4>*>(to)[(state / states * L::part + which * states + state % states) / 4] =
            Run<float, 4>::of(v);
      }
    }
  };
  // The outputs of this thread's tokens of a tile, from what all of the channel's threads left of it.
  const auto end = [&](Values& y, const typename Memory::Stage& stage, int k) {
    auto& warp = shared.of_tile(k);
    Values along, values;
    own_tokens.load(along, values, stage.rows[2], stage.rows[0]);
#pragma unroll
    for (int j = 0; j < own_channels; ++j) {
      load_floats(y[j], warp.parts(own_tokens.channel + 8 * j, 0, own_tokens.token));
#pragma unroll
      for (int q = 1; q < L::split; ++q) {
        float other[own];
        load_floats(other, warp.parts(own_tokens.channel + 8 * j, q, own_tokens.token));
#pragma unroll
        for (int u = 0; u < own; ++u) y[j][u] += other[u];
      }
#pragma unroll
      for (int u = 0; u < own; ++u)
        y[j][u] = (y[j][u] + D[j] * values[j][u]) * select(gated, along[j][u] * gate_sigmoid<T>(along[j][u]), 1.0f);
    }
  };
  // Runs of outputs, by the warps that bring fewer rows.
  constexpr int of_row = L::block_channels / run, stored = tokens * of_row, out_rows = threads / of_row;
  const int out_run = (role_thread() / 32 + warps - Runs::all % warps) % warps * 32 + lane;
  const int out_row = out_run / of_row, out_column = out_run % of_row * run;
  const int out_left = out_run < stored ? p.channels - first - out_column : 0;
  char* out = p.out.data;
  if (out_left > 0) out = p.out(chunk.batch, chunk.begin + out_row) + (first + out_column) * std::int64_t{sizeof(T)};
  const auto store_outputs = [&](int k) {  // of tile k, tile after tile
#pragma unroll
    for (int i = 0; i < (stored + threads - 1) / threads; ++i) {
      const int row = out_row + i * out_rows;
      if (out_left <= 0 || row >= length - k * tokens) return;
      store_run(reinterpret_cast<T*>(out + i * out_rows * p.out.token),
                *reinterpret_cast<const Run<T, run>*>(&shared.out[k & 1](row, out_column)), 0, out_left, p.vector);
    }
    out += tokens * p.out.token;
  };

  const auto stage = [&](int k) -> typename Memory::Stage& { return shared.stages[static_cast<unsigned>(k) % L::stages]; };
  async_wait<L::ahead>();
  __syncthreads();  // tile 0 is there
  if constexpr (prepares) {
    Made made;
    make(made, stage(0), length);
    States inputs;
    load_states(inputs, stage(0));
    put(made, 0), put_states(inputs, 0);
  }
  for (int k = 0; k < tiles; ++k) {
    async_wait<L::ahead - 1>();
    __syncthreads();  // tile k + 1 is there, the parts of tile k - 1 and the outputs of tile k - 2 are
    const int left = length - (k + 1) * tokens;  // behind this tile
    if (ends && k >= 2) store_outputs(k - 2);
    if constexpr (prepares) runs.load(stage(k + 1 + L::ahead), p, left - L::ahead * tokens);

    // All reads stand before the writes that could hold them up.
    Values ended;
    States inputs;
    Made made;
    if constexpr (prepares) load_states(inputs, stage(k + 1));
    if constexpr (ends) end(ended, stage(k - 1), k - 1);
    if constexpr (prepares) make(made, stage(k + 1), left), put(made, k + 1), put_states(inputs, (k + 1) & 1);
    if constexpr (ends) own_tokens.store(shared.out[(k + 1) & 1], ended);
  }
  async_wait<0>();
  if (tiles == 0) return;
  __syncthreads();
  if constexpr (ends) {
    if (tiles >= 2) store_outputs(tiles - 2);
    Values ended;
    end(ended, stage(tiles - 1), tiles - 1);
    own_tokens.store(shared.out[(tiles - 1) & 1], ended);
  }
  __syncthreads();
  if constexpr (ends) store_outputs(tiles - 1);
}

// Sequences are not cut: p.single.
template <class T, class L>
__global__ void __launch_bounds__(L::block_threads, L::resident) spread_kernel(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) char memory[];
  const int blocks = (p.channels + L::block_channels - 1) / L::block_channels;
  SpreadBlock<T, L> block{p, *reinterpret_cast<SpreadShared<T, L>*>(memory)};
  if (!p.chunks.find(blockIdx.x / blocks, block.chunk)) return;
  block.first = blockIdx.x % blocks * L::block_channels;
  block.length = block.chunk.end - block.chunk.begin, block.tiles = (block.length + L::tokens - 1) / L::tokens;
  if (threadIdx.x < threads) {
    spread_states(block);
  } else if constexpr (L::roles == 2) {
    spread_tokens<true, true>(block);
  } else {
    if (threadIdx.x < 2 * threads)
      spread_tokens<true, false>(block);
    else
      spread_tokens<false, true>(block);
  }
}

}  // namespace effcore::cuda::scan
