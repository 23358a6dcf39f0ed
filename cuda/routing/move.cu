// Rows between a tensor and lists of its tokens:
//
//   gather  list[b, i] = x[b, index[b, i]]      (zeros where the index is out of range)
//   merge   x[b, index[b, i]] = list[b, i] (+ residual[b, index[b, i]]) (+ first_residual[b, i])
//
// Bound: memory, each row read and written once. Both lists of a partition are one launch.
//
// Aligned rows: a block takes about 32 KiB of whole rows, finds their addresses once in shared memory, and its threads walk
// over the 16-byte vectors of all of them together, four loads in flight each, so that no lane waits for the end of a row.
// Other rows: a warp each (copy_row).
#include "common/path.h"
#include "effcore/cuda/routing.h"
#include "routing/rows.cuh"

namespace effcore::cuda::routing {
namespace {

constexpr int threads = 256, unroll = 4, most_rows = 512;
constexpr int block_vectors = 2 * threads * unroll;

struct MoveParams {
  Rows x, rows[2];
  List index[2];
  Rows residual, first_residual;  // data == nullptr: none
  std::int64_t items[2];          // batch * size
  std::int64_t size[2];
  int tokens, bytes, vectors;  // of x; of a row
  int block_rows;
  unsigned first_blocks;     // blocks of the first list
  std::uint64_t reciprocal;  // of `vectors`: ceil(2^32 / vectors)
};

struct Item {
  std::int64_t b, i;
  std::int32_t token;
};

__device__ __forceinline__ Item item_of(const MoveParams& p, int l, std::int64_t item) {
  const std::int64_t b = item / p.size[l], i = item - b * p.size[l];
  const std::int32_t token = p.index[l](b, i);
  return {b, i, token >= 0 && token < p.tokens ? token : -1};
}

// T is void where bytes are moved as they are, or the element type where residuals are added.
template <bool to_list, class T>
__global__ void __launch_bounds__(threads) move_vectors(const __grid_constant__ MoveParams p) {
  __shared__ char* listed[most_rows];
  __shared__ char* placed[most_rows];
  __shared__ const char* added[std::is_void_v<T> ? 1 : 2 * most_rows];
  const int l = blockIdx.x >= p.first_blocks;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x - (l ? p.first_blocks : 0)) * p.block_rows;
  const int rows = static_cast<int>(min(static_cast<std::int64_t>(p.block_rows), p.items[l] - first));
  for (int r = threadIdx.x; r < rows; r += threads) {
    const Item item = item_of(p, l, first + r);
    listed[r] = p.rows[l](item.b, item.i);
    placed[r] = item.token < 0 ? nullptr : p.x(item.b, item.token);
    if constexpr (!std::is_void_v<T>) {
      added[2 * r] = p.residual.data != nullptr && item.token >= 0 ? p.residual(item.b, item.token) : nullptr;
      added[2 * r + 1] = p.first_residual.data != nullptr && l == 0 ? p.first_residual(item.b, item.i) : nullptr;
    }
  }
  __syncthreads();
  const int count = rows * p.vectors;
  for (int start = threadIdx.x; start < count; start += threads * unroll) {
    uint4 x[unroll];
    char* to[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int v = start + u * threads;
      to[u] = nullptr;
      if (v >= count) continue;
      const int r = rows == 1 ? 0 : static_cast<int>(v * p.reciprocal >> 32), column = (v - r * p.vectors) * 16;
      const char* from = to_list ? placed[r] : listed[r];
      to[u] = to_list ? listed[r] : placed[r];
      x[u] = from != nullptr ? load_once(from + column) : uint4{};
      if constexpr (!std::is_void_v<T>) {
        auto sum = Vector<T>::from(x[u]);
#pragma unroll
        for (int k = 1; k >= 0; --k)
          if (const char* residual = added[2 * r + k]; residual != nullptr) {
            const auto y = Vector<T>::from(load_once(residual + column));
#pragma unroll
            for (int i = 0; i < Vector<T>::size; ++i) sum.x[i] += y.x[i];
          }
        x[u] = sum.bits();
      }
      if (to[u] != nullptr) to[u] += column;
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (to[u] != nullptr) *reinterpret_cast<uint4*>(to[u]) = x[u];
  }
}

template <bool to_list, class T>
__global__ void __launch_bounds__(threads) move_rows(const __grid_constant__ MoveParams p) {
  constexpr int warps = threads / 32;
  const int l = blockIdx.x >= p.first_blocks, lane = threadIdx.x % 32;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x - (l ? p.first_blocks : 0)) * warps + threadIdx.x / 32;
  if (item >= p.items[l]) return;
  const Item at = item_of(p, l, item);
  char* const listed = p.rows[l](at.b, at.i);
  if (at.token < 0) {
    if (to_list)
      for (int k = 2 * lane; k < p.bytes; k += 64) *reinterpret_cast<std::uint16_t*>(listed + k) = 0;
    return;
  }
  char* const placed = p.x(at.b, at.token);
  if constexpr (std::is_void_v<T>) {
    if (to_list)
      copy_row(listed, source_of(p.x, at.b, at.token), p.bytes, lane);
    else
      copy_row(placed, source_of(p.rows[l], at.b, at.i), p.bytes, lane);
  } else {
    const Source own = p.first_residual.data != nullptr && l == 0 ? source_of(p.first_residual, at.b, at.i) : Source{};
    const Source all = p.residual.data != nullptr ? source_of(p.residual, at.b, at.token) : Source{};
    sum_row<T>(placed, source_of(p.rows[l], at.b, at.i), own, all, p.bytes, lane);
  }
}

template <bool to_list, class T>
void run(MoveParams p, bool vectors, const char* function, cudaStream_t stream) {
  p.vectors = p.bytes / 16;
  p.block_rows = vectors ? std::clamp(block_vectors / std::max(p.vectors, 1), 1, most_rows) : threads / 32;
  if (p.vectors > 0) p.reciprocal = ((std::uint64_t{1} << 32) + p.vectors - 1) / p.vectors;
  const auto blocks = [&](int l) { return grid((p.items[l] + p.block_rows - 1) / p.block_rows, function); };
  p.first_blocks = blocks(0);
  launch(function, vectors ? move_vectors<to_list, T> : move_rows<to_list, T>,
         grid(std::int64_t{p.first_blocks} + blocks(1), function), threads, 0, stream, p);
}

MoveParams params_of(const TensorView& x, const effcore::routing::List* list, int lists) {
  MoveParams p{};
  p.x = rows_of(x);
  p.tokens = static_cast<int>(x.size[1]);
  p.bytes = static_cast<int>(x.size[2] * element_bytes(x.dtype));
  for (int l = 0; l < lists; ++l) {
    p.rows[l] = rows_of(list[l].rows);
    p.index[l] = list_of(list[l].index);
    p.size[l] = list[l].rows.size[1];
    p.items[l] = list[l].rows.size[0] * p.size[l];
  }
  return p;
}

}  // namespace

std::size_t workspace_bytes(const Gather&) {
  return 0;
}
std::size_t workspace_bytes(const Merge&) {
  return 0;
}

void gather(const Gather& args, const Launch& to) {
  const char* f = args.lists == 2 ? "separate_tokens" : "gather_tokens";
  refuse_float64(args.x.dtype, f);
  if (args.x.size[2] == 0) return;
  bool vectors = aligned(args.x);
  for (int l = 0; l < args.lists; ++l) vectors = vectors && aligned(args.list[l].rows);
  run<true, void>(params_of(args.x, args.list, args.lists), vectors, f, static_cast<cudaStream_t>(to.stream));
}

void merge(const Merge& args, const Launch& to) {
  const char* f = "merge_tokens";
  const auto stream = static_cast<cudaStream_t>(to.stream);
  refuse_float64(args.out.dtype, f);
  if (args.out.size[2] == 0) return;
  MoveParams p = params_of(args.out, args.list, 2);
  bool vectors = aligned(args.out) && aligned(args.list[0].rows) && aligned(args.list[1].rows);
  if (args.residual == nullptr && args.first_residual == nullptr) return run<false, void>(p, vectors, f, stream);
  if (args.residual != nullptr) p.residual = rows_of(*args.residual), vectors = vectors && aligned(*args.residual);
  if (args.first_residual != nullptr)
    p.first_residual = rows_of(*args.first_residual), vectors = vectors && aligned(*args.first_residual);
  with_type(args.out.dtype, f, [&]<class T>(T) { run<false, T>(p, vectors, f, stream); });
}

const char* path(DType dtype) {
  const char* none = path_refusal(dtype);
  return none != nullptr ? none : "sm_80";
}

}  // namespace effcore::cuda::routing
