// out [M, O] = f(x downᵀ upᵀ + bias) in one pass over x: the intermediate H = x downᵀ stays in registers.
//
// A block owns 128 rows of x, 64 a warpgroup:
//   1.  H [64, R] += x tile [64, 64] down tile [R, 64]ᵀ          over I in steps of 64, operands in shared memory
//   2.  out tile [64, N] = H up tile [N, R]ᵀ                     over O in steps of N; H, rounded, is the register operand
// Steps of both phases go through one ring of `Stages` tiles that cp.async fills two steps ahead, so that `up` arrives while H
// is still being summed. A step's product runs while the tile before it is given bias and activation, and is written out
// through shared memory in rows of whole sectors.
//
// Bound, M = 16384, 768 -> 3072 in bf16: x and out are 126 MB, 42 us at 3 TB/s; 2 M R (I + O) operations are 16 us at r = 128
// and 32 us at 256 of 1 PFLOP/s; each block reads all of down and up from the L2 cache, M / 128 times 2 R (I + O) bytes: 23 and
// 46 us at 5.5 TB/s. Two library products move H as well, and out's bound is met by the second of them alone.
#pragma once
#include "lowrank/activation.cuh"
#include "lowrank/wgmma.cuh"

namespace effcore::cuda::lowrank {

struct FusedParams {
  const void *x, *down, *up, *bias;
  void *out, *hidden, *before;
  std::int64_t x_stride, down_stride, up_stride, out_stride;
  std::int64_t rows;
  int in, rank, columns;
  int split_columns;  // of out for one block of grid.y; a multiple of the tile's
  Activation activation;
};

template <class T_, int Rank, int Columns, int Stages_>
struct Fused {
  using T = T_;
  static constexpr int threads = 256, rows = 128, depth = 64, columns = Columns, stages = Stages_, rank = Rank;
  static constexpr int first_bytes = (rows + Rank) * 128, second_bytes = Columns * Rank * 2;
  static constexpr int stage_bytes = first_bytes > second_bytes ? first_bytes : second_bytes;
  static constexpr int pitch = Columns * 2 + 16;  // of a staged row: eight rows stand in different banks
  static constexpr int staging_bytes = rows * pitch;
  static constexpr int shared_bytes = stages * stage_bytes + staging_bytes + 1024;
  static constexpr int wide = Rank >= 128 ? 128 : 64;  // columns of H in one instruction
};

// Rows [row, row + Rows) and columns [column, column + 64) of a matrix into a swizzled tile; zeros outside of it.
template <class Config, int Rows>
__device__ __forceinline__ void load_rows(std::uint32_t tile, const typename Config::T* from, std::int64_t stride,
                                          std::int64_t row, std::int64_t rows, int column, int columns) {
  constexpr int step = Config::threads / 8;
  const int chunk = threadIdx.x & 7, first = threadIdx.x / 8, c = column + chunk * 8;
  const std::uint32_t to = tile + first * 128 + (chunk ^ (first & 7)) * 16;
  const typename Config::T* source = from + (row + first) * stride + c;
#pragma unroll
  for (int r = 0; r < Rows; r += step, source += step * stride) {
    const bool valid = c < columns && row + first + r < rows;
    if (Rows >= step || first < Rows) async_copy_16(to + r * 128, valid ? source : from, valid);
  }
}

template <class Config>
struct FusedBlock {
  using T = typename Config::T;
  static constexpr int N = Config::columns, R = Config::rank;
  using Tile = float[N / 2];

  const FusedParams& p;
  std::uint32_t ring;
  char* staging;  // of this warp
  std::int64_t row0;
  int column0, column_end, first_steps, steps;

  __device__ void load(int step) const {
    if (step < steps) {
      const std::uint32_t stage = ring + step % Config::stages * Config::stage_bytes;
      if (step < first_steps) {
        const int k = step * Config::depth;
        load_rows<Config, Config::rows>(stage, static_cast<const T*>(p.x), p.x_stride, row0, p.rows, k, p.in);
        load_rows<Config, R>(stage + Config::rows * 128, static_cast<const T*>(p.down), p.down_stride, 0, p.rank, k, p.in);
      } else {
        const int n = column0 + (step - first_steps) * N;
#pragma unroll
        for (int q = 0; q < R / 64; ++q)
          load_rows<Config, N>(stage + q * N * 128, static_cast<const T*>(p.up), p.up_stride, n, column_end, q * 64, p.rank);
      }
    }
    async_commit();
  }

  // Afterwards the step's tile is in shared memory for all, and nobody still reads the one that `load` fills.
  __device__ void begin(int step) const {
    async_wait<Config::stages - 3>();
    wgmma::publish();
    __syncthreads();
    load(step + Config::stages - 2);
  }

  // Bias and rounding in registers; then row by row, 16 bytes a lane, to memory. The activation comes last, on what is rounded,
  // as it does where layers are separate: its code exists once instead of once an accumulator.
  __device__ void finish(Tile& values, int n) const {
    const int lane = threadIdx.x & 31, r = lane / 4, c = 2 * (lane % 4);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      float2 b = make_float2(0.0f, 0.0f);
      if (p.bias != nullptr && n + c + j * 8 < column_end)
        b = unpack<T>(*reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(p.bias) + n + c + j * 8));
      char* at = staging + r * Config::pitch + (j * 8 + c) * 2;
      *reinterpret_cast<std::uint32_t*>(at) = pack<T>(values[4 * j] + b.x, values[4 * j + 1] + b.y);
      *reinterpret_cast<std::uint32_t*>(at + 8 * Config::pitch) = pack<T>(values[4 * j + 2] + b.x, values[4 * j + 3] + b.y);
    }
    __syncwarp();
    if (p.before != nullptr) copy_out<Activation::none>(p.before, p.columns, n);
    dispatch(p.activation, [&](auto f) { copy_out<decltype(f)::value>(p.out, p.out_stride, n); });
  }

  // This warp's 16 staged rows, to columns [n, n + N) of `to`.
  template <Activation activation>
  __device__ void copy_out(void* to, std::int64_t stride, int n) const {
    constexpr int chunks = N / 8;
    const std::int64_t row = row0 + threadIdx.x / 32 * 16;
#pragma unroll activation == Activation::none ? 16 * chunks / 32 : 1
    for (int i = threadIdx.x & 31; i < 16 * chunks; i += 32) {
      const int line = i / chunks, column = n + i % chunks * 8;
      if (row + line >= p.rows || column >= column_end) continue;
      uint4 x = *reinterpret_cast<const uint4*>(staging + line * Config::pitch + i % chunks * 16);
      if constexpr (activation != Activation::none) {
        std::uint32_t* const pairs = reinterpret_cast<std::uint32_t*>(&x);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 v = unpack<T>(pairs[k]);
          pairs[k] = pack<T>(value<activation>(v.x), value<activation>(v.y));
        }
      }
      *reinterpret_cast<uint4*>(static_cast<T*>(to) + (row + line) * stride + column) = x;
    }
  }

  // The product of one step of the second phase into `now`, while `last`, of the step before, is finished.
  __device__ void second(int step, const Operand<T> (&h)[R / 16], Tile& now, Tile& last) const {
    begin(step);
    const std::uint32_t stage = ring + step % Config::stages * Config::stage_bytes;
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < R / 16; ++k)
      wgmma::multiply<T>(now, h[k], wgmma::describe(stage + k / 4 * N * 128 + k % 4 * 32), k > 0);
    wgmma::commit();
    wgmma::wait<1>();
    wgmma::arrived(last);
    if (step > first_steps) finish(last, column0 + (step - 1 - first_steps) * N);
  }

  __device__ void run() const {
    constexpr int parts = R / Config::wide;
    Operand<T> h[R / 16];
#pragma unroll
    for (int s = 0; s < Config::stages - 2; ++s) load(s);
    {
      float sums[parts][Config::wide / 2];
      const int group = threadIdx.x / 128;
      for (int step = 0; step < first_steps; ++step) {
        begin(step);
        const std::uint32_t stage = ring + step % Config::stages * Config::stage_bytes;
        const std::uint32_t x = stage + group * 64 * 128, down = stage + Config::rows * 128;
        wgmma::fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int part = 0; part < parts; ++part)
            wgmma::multiply<T>(sums[part], wgmma::describe(x + k * 32),
                               wgmma::describe(down + part * Config::wide * 128 + k * 32), step > 0 || k > 0);
        wgmma::commit();
        wgmma::wait<1>();
      }
      wgmma::wait<0>();
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        wgmma::arrived(sums[part]);
#pragma unroll
        for (int k = 0; k < Config::wide / 16; ++k) {
          const float* s = sums[part] + 8 * k;
          Operand<T>& a = h[part * (Config::wide / 16) + k];
          a.reg[0] = pack<T>(s[0], s[1]), a.reg[1] = pack<T>(s[2], s[3]);
          a.reg[2] = pack<T>(s[4], s[5]), a.reg[3] = pack<T>(s[6], s[7]);
        }
      }
    }
    if (p.hidden != nullptr && column0 == 0) write_hidden(h);

    Tile even, odd;
    int step = first_steps;
    for (; step + 1 < steps; step += 2) {
      second(step, h, even, odd);
      second(step + 1, h, odd, even);
    }
    if (step < steps) {
      second(step, h, even, odd);
      wgmma::wait<0>();
      wgmma::arrived(even);
      finish(even, column0 + (step - first_steps) * N);
    } else {
      wgmma::wait<0>();
      wgmma::arrived(odd);
      finish(odd, column0 + (step - 1 - first_steps) * N);
    }
  }

  __device__ void write_hidden(const Operand<T> (&h)[R / 16]) const {
    const int lane = threadIdx.x & 31;
    const std::int64_t row = row0 + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int k = 0; k < R / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t at = row + i % 2 * 8;
        const int column = k * 16 + i / 2 * 8 + 2 * (lane % 4);
        if (at < p.rows && column < p.rank)
          *reinterpret_cast<std::uint32_t*>(static_cast<T*>(p.hidden) + at * p.rank + column) = h[k].reg[i];
      }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1) fused_kernel(const FusedParams p) {
#ifdef EFFCORE_WGMMA
  extern __shared__ char memory[];
  char* const ring = memory + (1024 - (shared_address(memory) & 1023)) % 1024;
  const int column0 = blockIdx.y * p.split_columns;
  const int column_end = min(p.columns, column0 + p.split_columns);
  const int first_steps = (p.in + Config::depth - 1) / Config::depth;
  const int steps = first_steps + (column_end - column0 + Config::columns - 1) / Config::columns;
  const FusedBlock<Config> block{p,
                                 shared_address(ring),
                                 ring + Config::stages * Config::stage_bytes + threadIdx.x / 32 * 16 * Config::pitch,
                                 static_cast<std::int64_t>(blockIdx.x) * Config::rows,
                                 column0,
                                 column_end,
                                 first_steps,
                                 steps};
  block.run();
#endif
}

}  // namespace effcore::cuda::lowrank
