// result[e] = alpha * x[e]^T x[e] + beta * previous[e], for ragged groups of tokens.
//
// Bound: FLOPs, T * D^2 for 128 x 128 tiles on and above the diagonal (a general product does 2 T D^2). A block of 8 warps
// takes one tile and one segment of tokens (segments.cuh); x streams through a ring of stages of `steps` tokens x 128 columns,
// twice a step off the diagonal and once on it. Both operands are read transposed by ldmatrix, so x is never copied. A warp
// owns 64 x 32 of the sums: 6 ldmatrix feed 16 mma a step of 16 tokens. Blocks of one segment are neighbours, so that its
// tokens come from L2. 16-bit tokens on sm_90a whose rows start at multiples of 16 bytes go to hopper/gram.cuh.
#include <algorithm>
#include <stdexcept>

#include "common/path.h"
#include "common/tile.cuh"
#include "effcore/cuda/kronecker.h"
#include "kronecker/gram.cuh"
#include "kronecker/hopper/gram.h"

namespace effcore::cuda::kronecker {
namespace {

constexpr int warps = 8, threads = 32 * warps, sum_blocks = 1024;

// 96 KiB in 16-bit dtypes: what the GPUs with least shared memory allow, and two blocks an SM on an H100.
template <class T>
struct Ring {
  static constexpr int steps = is_16bit<T> ? 64 : 16, stages = 3;
  static constexpr int operand_bytes = steps * block * static_cast<int>(sizeof(T));
  static constexpr int bytes = stages * 2 * operand_bytes;
};

template <class T>
__global__ void __launch_bounds__(threads, is_16bit<T> ? 2 : 1) gram_kernel(GramParams p) {
  extern __shared__ __align__(1024) char memory[];
  const Segment segment = p.groups.segments[blockIdx.x / p.tiles];
  if (segment.expert < 0) return;
  const int number = blockIdx.x % p.tiles, columns = (p.dim + block - 1) / block;
  const int2 place = triangle(number, columns);
  const bool diagonal = place.x == place.y;
  constexpr int steps = Ring<T>::steps, stages = Ring<T>::stages;

  const auto* x = static_cast<const T*>(p.x);
  const Matrix<T> rows{x + place.x * block, p.stride, min(block, p.dim - place.x * block), p.aligned};
  const Matrix<T> cols{x + place.y * block, p.stride, min(block, p.dim - place.y * block), p.aligned};
  const auto tile_of = [&](int stage, int side) {
    return Tile<T, block>(memory + (2 * stage + side) * Ring<T>::operand_bytes);
  };
  const int count = (segment.end - segment.begin + steps - 1) / steps;
  const auto fetch = [&](int step) {
    if (step < count) {
      const int token = segment.begin + step * steps;
      load_tile<steps, threads>(tile_of(step % stages, 0), rows, token, segment.begin, segment.end);
      if (!diagonal) load_tile<steps, threads>(tile_of(step % stages, 1), cols, token, segment.begin, segment.end);
    }
    async_commit();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = warp / 4 * 64, column0 = warp % 4 * 32;
  float sums[4][4][4];
#pragma unroll
  for (auto& row : sums) clear(row);

#pragma unroll
  for (int step = 0; step < stages - 1; ++step) fetch(step);
  for (int step = 0; step < count; ++step) {
    async_wait<stages - 2>();
    __syncthreads();  // this step has arrived for everybody, and the stage fetched into next is read no more
    fetch(step + stages - 1);
    const auto a = tile_of(step % stages, 0), b = tile_of(step % stages, diagonal ? 0 : 1);
    product<T, 4, steps / 16, 2>(
        sums, [&](int m, int k) { return a.a_transposed(16 * k, row0 + 16 * m); },
        [&](int k, int n) { return b.b_transposed(16 * k, column0 + 16 * n); });
  }

  float* const partial =
      segment.slot < 0 ? nullptr : p.partial + (static_cast<std::int64_t>(segment.slot) * p.tiles + number) * block * block;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row0 + 16 * m + lane / 4 + i / 2 * 8, c = column0 + 8 * n + 2 * (lane % 4) + i % 2;
        if (partial != nullptr)
          partial[r * block + c] = sums[m][n][i];
        else
          store_element(p, segment.expert, place.x * block + r, place.y * block + c, sums[m][n][i]);
      }
}

// Adds up the partial sums of experts with several segments, in their order. A block takes an eighth of a tile, and more of
// them in turn: mostly there are none.
__global__ void __launch_bounds__(threads) gram_sum_kernel(GramParams p) {
  const std::int64_t step = static_cast<std::int64_t>(p.tiles) * block * block / 4;
  constexpr int pieces = 8, count = block * block / 4 / pieces;
  const std::int64_t all_work = static_cast<std::int64_t>(p.groups.max_splits) * p.tiles * pieces;
  for (std::int64_t work = blockIdx.x; work < all_work; work += gridDim.x) {
    const int tile = static_cast<int>(work / pieces), number = tile % p.tiles;
    const Split all = p.groups.splits[tile / p.tiles];
    if (all.slots == 0) return;  // the list's end
    const int2 place = triangle(number, (p.dim + block - 1) / block);
    const auto* partial =
        reinterpret_cast<const float4*>(p.partial) + all.first * step + static_cast<std::int64_t>(number) * block * block / 4;
    const int begin = static_cast<int>(work % pieces) * count;
    for (int i = begin + threadIdx.x; i < begin + count; i += threads) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int s = 0; s < all.slots; ++s) {
        const float4 x = partial[s * step + i];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      const int row = place.x * block + i * 4 / block, column = place.y * block + i * 4 % block;
      store_element(p, all.expert, row, column, sum.x);
      store_element(p, all.expert, row, column + 1, sum.y);
      store_element(p, all.expert, row, column + 2, sum.z);
      store_element(p, all.expert, row, column + 3, sum.w);
    }
  }
}

constexpr std::int64_t align(std::int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// Everything that follows from shapes alone, so that results are the same on every GPU.
struct Plan {
  std::int64_t tiles, experts, tokens, length, segments, splits, slots;
  std::int64_t splits_at, drawn_at, partial_at, bytes;

  explicit Plan(const GroupedGram& args) {
    const std::int64_t columns = (args.x.size[1] + block - 1) / block;
    tiles = columns * (columns + 1) / 2;
    experts = args.offsets.size[0] - 1;
    tokens = args.x.size[0];
    // About 512 blocks where there are few tiles; segments of 16384 tokens bound the last block's time where one expert has
    // most.
    length = std::clamp<std::int64_t>(tokens * tiles / 512 / 64 * 64, 512, 16384);
    splits = tokens / length;  // an expert with n > 1 segments has more than (n - 1) * length tokens
    segments = experts + splits;
    slots = 2 * splits;
    splits_at = align(segments * static_cast<std::int64_t>(sizeof(Segment)));
    drawn_at = splits_at + align(splits * static_cast<std::int64_t>(sizeof(Split)));
    partial_at = drawn_at + align(sizeof(int));
    bytes = partial_at + slots * tiles * block * block * 4;
  }
};

bool run_on_hopper([[maybe_unused]] const GramParams& p, [[maybe_unused]] DType dtype, [[maybe_unused]] cudaStream_t stream) {
#ifdef EFFCORE_HOPPER
  return on_hopper("grouped_gram") && hopper::grouped_gram("grouped_gram", p, dtype, stream);
#else
  return false;
#endif
}

template <class T>
void run(const GramParams& p, unsigned blocks, cudaStream_t stream) {
  launch("grouped_gram", gram_kernel<T>, blocks, threads, Ring<T>::bytes, stream, p);
}

}  // namespace

std::size_t workspace_bytes(const GroupedGram& args) {
  return static_cast<std::size_t>(Plan(args).bytes);
}

void grouped_gram(const GroupedGram& args, const Launch& where) {
  const char* f = "grouped_gram";
  const Plan plan(args);
  if (plan.experts == 0 || plan.tiles == 0) return;
  if (plan.tokens > INT32_MAX || args.x.size[1] > INT32_MAX || plan.segments * plan.tiles > INT32_MAX)
    throw std::invalid_argument("effcore.grouped_gram: x is too large for one launch");
  auto* const memory = static_cast<char*>(where.workspace);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  GramParams p{};
  p.groups = {static_cast<const std::int32_t*>(args.offsets.data),
              static_cast<int>(plan.experts),
              static_cast<int>(plan.tokens),
              static_cast<int>(plan.length),
              static_cast<int>(plan.segments),
              static_cast<int>(plan.splits),
              static_cast<int>(plan.slots),
              reinterpret_cast<Segment*>(memory),
              reinterpret_cast<Split*>(memory + plan.splits_at),
              reinterpret_cast<int*>(memory + plan.drawn_at)};
  p.x = args.x.data;
  p.stride = args.x.stride[0];
  p.dim = static_cast<int>(args.x.size[1]);
  p.tiles = static_cast<int>(plan.tiles);
  const std::int64_t size = args.x.dtype == DType::float32 ? 4 : 2;
  p.aligned = reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0 && p.stride * size % 16 == 0 && p.dim * size % 16 == 0;
  p.alpha = static_cast<float>(args.alpha);
  p.beta = static_cast<float>(args.beta);
  p.result = static_cast<float*>(args.result);
  p.previous = args.beta != 0.0 ? static_cast<const float*>(args.previous) : nullptr;
  p.partial = reinterpret_cast<float*>(memory + plan.partial_at);

  plan_segments<<<1, 32, 0, stream>>>(p.groups);
  check_launch(f);
  const auto blocks = static_cast<unsigned>(plan.segments * plan.tiles);
  if (!run_on_hopper(p, args.x.dtype, stream)) {
    switch (args.x.dtype) {
      case DType::bfloat16: run<bf16>(p, blocks, stream); break;
      case DType::float16: run<fp16>(p, blocks, stream); break;
      case DType::float32: run<float>(p, blocks, stream); break;
      default: throw std::invalid_argument("effcore.grouped_gram: float64 is not supported on CUDA");
    }
  }
  launch(f, gram_sum_kernel, plan.splits > 0 ? sum_blocks : 0, threads, 0, stream, p);
}

const char* path(DType dtype) {
  return product_path(dtype);
}

}  // namespace effcore::cuda::kronecker
