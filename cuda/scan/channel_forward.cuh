// The forward of the selective scan for up to 16 states: a whole channel a thread.
//
// A warp goes alone through a chunk of 32 channels, in tiles of 8 tokens, and waits for no other. The rows of the next tile
// come to shared memory as they are while this one is worked on; a thread makes of them what its channel needs, and keeps it.
// So only B and C, as floats, are read by more than one thread, and all threads read the same ones at once: half the traffic
// with shared memory of a tile whose channels and states are spread over threads (forward.cu), and fewer instructions. A token
// of 32 channels takes 137 instructions, 80 of them the states' own, where the special functions take 152 cycles on a quarter
// of a multiprocessor.
#pragma once
#include "common/tile.cuh"
#include "scan/tiles.cuh"

namespace effcore::cuda::scan {

struct Whole {
  static constexpr int padded = 16, states = padded, channels = 32;  // of a thread; of a warp
  static constexpr int block_channels = warps * channels, tokens = tile;
};

// What a warp has in shared memory.
template <class T, class L>
struct alignas(16) Lane {
  struct Rows {
    T x[L::tokens][L::channels], dt[L::tokens][L::channels], z[L::tokens][L::channels];
  };
  Rows rows[2];  // one tile is worked on, the next is on its way
  float B[L::tokens][L::padded], C[L::tokens][L::padded];
  T out[L::tokens][L::channels];
};

// The runs of 16 bytes of a tile's rows that this lane moves, tile after tile.
template <class T, class L>
struct RowRuns {
  static constexpr int run = 16 / sizeof(T), of_row = L::channels / run, rows = 32 / of_row, runs = L::tokens / rows;
  char* at;  // of the tile to come
  std::int64_t token;
  int row, channel, left;  // channels of the row from this lane's first one on

  __device__ __forceinline__ RowRuns(const Rows& from, int lane, std::int64_t b, int t, int first, int channels)
      : at(from.data == nullptr ? nullptr : from(b, t + lane / of_row) + (first + lane % of_row * run) * sizeof(T)),
        token(from.token),
        row(lane / of_row),
        channel(lane % of_row * run),
        left(channels - first - channel) {}

  // tokens: left in the chunk; what lies behind them, or behind the channels, is 0
  __device__ __forceinline__ void load(T (&to)[L::tokens][L::channels], const Rows& of, int tokens, bool vector) {
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      const bool any = row + i * rows < tokens && left > 0;
      const char* from = at + i * rows * token;
      if (vector)
        async_copy_16(shared_address(&to[row + i * rows][channel]), any ? from : of.data, any);
      else
        *reinterpret_cast<Run<T, run>*>(&to[row + i * rows][channel]) =
            load_run<run>(reinterpret_cast<const T*>(from), 0, any ? left : 0, false);
    }
    at += L::tokens * token;
  }
  __device__ __forceinline__ void store(const T (&from)[L::tokens][L::channels], int tokens, bool vector) {
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      if (row + i * rows >= tokens) break;
      store_run(reinterpret_cast<T*>(at + i * rows * token),
                *reinterpret_cast<const Run<T, run>*>(&from[row + i * rows][channel]), 0, left, vector);
    }
    at += L::tokens * token;
  }
};

// B and C of a tile on their way: a lane's 8 states of one token, of one of them.
template <class T, class L>
struct StateRuns {
  Run<T, 8> held;
  const char* at;
  std::int64_t token;
  int row, state;
  bool second;

  __device__ __forceinline__ StateRuns(const ScanParams& p, int lane, std::int64_t b, int t)
      : row(lane % 16 / 2), state(lane % 2 * 8), second(lane >= 16) {
    const Rows& from = second ? p.C : p.B;
    at = from(b, t + row), token = from.token;
  }
  __device__ __forceinline__ void load(int tokens, const ScanParams& p) {
    held = load_run<8>(reinterpret_cast<const T*>(at), state, row < tokens ? p.states : 0, p.vector_states);
    at += L::tokens * token;
  }
  __device__ __forceinline__ void put(float (&B)[L::tokens][L::padded], float (&C)[L::tokens][L::padded]) const {
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = held[j];
    store_floats(&(second ? C : B)[row][state], v);
  }
};

// outputs: all that the op writes. Otherwise the effect of each chunk but a sequence's last one, from a zero state.
template <class T, class L, bool outputs>
__global__ void __launch_bounds__(threads, 4) channel_kernel(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) char memory[];
  constexpr int owned = L::states, together = 4;  // tokens that a thread prepares at a time
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto& shared = reinterpret_cast<Lane<T, L>*>(memory)[warp];
  const int blocks = (p.channels + L::block_channels - 1) / L::block_channels, chunk_row = blockIdx.x / blocks;
  const int first = blockIdx.x % blocks * L::block_channels + warp * L::channels, c = first + lane;
  Chunks::Chunk chunk;
  if (first >= p.channels || !p.chunks.find(chunk_row, chunk) || (!outputs && chunk.last())) return;
  const bool exists = c < p.channels;
  const int count = exists ? p.states : 0;

  RowRuns<T, L> x(p.x, lane, chunk.batch, chunk.begin, first, p.channels),
      dt(p.dt, lane, chunk.batch, chunk.begin, first, p.channels);
  RowRuns<T, L> z(p.z, lane, chunk.batch, chunk.begin, first, p.channels),
      out(p.out, lane, chunk.batch, chunk.begin, first, p.channels);
  StateRuns<T, L> inputs(p, lane, chunk.batch, chunk.begin);
  const bool gated = outputs && p.z.data != nullptr;
  const auto fetch = [&](int turn, int tokens) {
    x.load(shared.rows[turn].x, p.x, tokens, p.vector), dt.load(shared.rows[turn].dt, p.dt, tokens, p.vector);
    if (gated) z.load(shared.rows[turn].z, p.z, tokens, p.vector);
    async_commit();
    inputs.load(tokens, p);
  };
  fetch(0, chunk.end - chunk.begin);

  const float bias = exists && p.bias.data != nullptr ? p.bias.at<T>(c) : 0.0f;
  const float D = exists && outputs && p.D.data != nullptr ? p.D.at<T>(c) : 0.0f;
  // [states][channels] of a chunk or of a piece, this thread's column
  const auto matrix = [&](float* matrices, std::int64_t row) { return matrices + row * p.states * p.channels + c; };
  float A[owned], h[owned], steps = 0.0f;
#pragma unroll
  for (int n = 0; n < owned; ++n) {
    A[n] = n < count ? fmaxf(p.A.at<T>(c, n) * log2_e, -FLT_MAX) : 0.0f;
    h[n] = 0.0f;
    if (outputs && n < count && !p.single) h[n] = matrix(p.carried, chunk_row)[std::int64_t{n} * p.channels];
    if (outputs && n < count && p.single && p.entering != nullptr)
      h[n] = p.entering[(std::int64_t{chunk.sequence} * p.channels + c) * p.states + n];
  }
  const auto store_states = [&](float* to) {
#pragma unroll
    for (int n = 0; n < owned; ++n)
      if (n < count) to[std::int64_t{n} * p.channels] = h[n];
  };

  int turn = 0, keep_at = chunk.begin;  // chunks begin where states are kept
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += L::tokens, turn ^= 1) {
    if (outputs && p.kept != nullptr && t0 == keep_at) {
      store_states(matrix(p.kept, kept_row(p, chunk, t0)));
      keep_at += p.keep;
    }
    async_wait<0>();
    __syncwarp();
    inputs.put(shared.B, shared.C);
    fetch(turn ^ 1, chunk.end - t0 - L::tokens);
    __syncwarp();
    const auto& rows = shared.rows[turn];
    const int left = chunk.end - t0;
    T ended[L::tokens];  // written behind all reads, which they would hold up
#pragma unroll
    for (int i0 = 0; i0 < L::tokens; i0 += together) {
      float step[together], input[together], gate[together], skip[together];
#pragma unroll
      for (int i = 0; i < together; ++i) {
        const int t = i0 + i;
        const float value = to_float(rows.x[t][lane]), sum = to_float(rows.dt[t][lane]) + bias;
        step[i] = select(p.softplus, softplus_of<T>(sum), sum);
        if (t >= left) step[i] = 0.0f;  // leaves the state as it is
        input[i] = step[i] * value;
        if constexpr (outputs) {
          const float along = to_float(rows.z[t][lane]);
          gate[i] = select(gated, along * gate_sigmoid<T>(along), 1.0f), skip[i] = D * value;
        } else {
          steps += step[i];
        }
      }
#pragma unroll
      for (int i = 0; i < together; ++i) {
        float halves[2] = {};
#pragma unroll
        for (int n0 = 0; n0 < owned; n0 += 4) {
          float from[4], to[4];
          load_floats(from, &shared.B[i0 + i][n0]);
          if constexpr (outputs) load_floats(to, &shared.C[i0 + i][n0]);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            h[n0 + n] = decay(step[i], A[n0 + n]) * h[n0 + n] + input[i] * from[n];
            if constexpr (outputs) halves[n % 2] += h[n0 + n] * to[n];
          }
        }
        if constexpr (outputs) ended[i0 + i] = from_float<T>((halves[0] + halves[1] + skip[i]) * gate[i]);
      }
    }
    if constexpr (outputs) {
#pragma unroll
      for (int i = 0; i < L::tokens; ++i) shared.out[i][lane] = ended[i];
      __syncwarp();
      out.store(shared.out, left, p.vector);
    }
  }
  if constexpr (outputs) {
    if (!chunk.last() || !exists) return;
    const bool vectors = p.states == owned && reinterpret_cast<std::uintptr_t>(p.leaving) % 16 == 0;
    store_run(p.leaving + (std::int64_t{chunk.sequence} * p.channels + c) * p.states, Run<float, owned>::of(h), 0, p.states,
              vectors);
  } else {
    store_states(matrix(p.carried, chunk_row));
    if (exists) p.step_sum[std::int64_t{chunk_row} * p.channels + c] = steps;
  }
}

}  // namespace effcore::cuda::scan
