// Tiles of a tensor in shared memory, in panels (wgmma.cuh), and which of them a block needs.
#pragma once
#include "attention/hopper/tensor_map.h"
#include "attention/visibility.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::hopper {

using attention::KeyRange;
using attention::Shape;
using attention::Visibility;
using attention::Work;

// Copies a tile of `rows` tokens in panels of 64 columns.
template <int D, int rows, class T>
__device__ __forceinline__ void load_panels(T* to, const CUtensorMap& map, BarrierWord* full, Keep keep, int token, int head,
                                            int batch) {
#pragma unroll
  for (int panel = 0; panel < D / panel_columns; ++panel)
    cute::SM90_TMA_LOAD_4D::copy(&map, full, static_cast<std::uint64_t>(keep), to + panel * rows * panel_columns,
                                 panel * panel_columns, token, head, batch);
}

// The same by a warp's ordinary loads, with zeros in place of rows outside [low, high): values that no query may see, NaN or
// not, must not be multiplied, not even by P = 0.
template <int D, int rows, class T>
__device__ __forceinline__ void load_panels_between(T* to, const Matrix<T>& from, int token, int low, int high) {
  constexpr int chunks = D / 8;
  for (int i = threadIdx.x % 32; i < rows * chunks; i += 32) {
    const int row = i / chunks, chunk = i % chunks;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (token + row >= low && token + row < high && chunk * 8 < from.columns)
      x = *reinterpret_cast<const uint4*>(from.data + (token + row) * from.stride + chunk * 8);
    *reinterpret_cast<uint4*>(to + chunk / 8 * rows * panel_columns + row * panel_columns + (chunk % 8 ^ row % 8) * 8) = x;
  }
  fence_async();
  __syncwarp();
}

// The tiles of keys [first, end) that queries [row, last] see.
struct TileRange {
  int first, end;
  __device__ TileRange(const KeyRange& range, int keys)
      : first(range.begin / keys), end(range.empty() ? first : (range.end + keys - 1) / keys) {}
};

// The tiles of values and how to get one: by TMA, or by hand where it holds rows that must be zeroed.
template <class T, int D, int keys>
struct ValueLoader {
  static constexpr int bytes = keys * D * static_cast<int>(sizeof(T));
  const CUtensorMap& map;
  const attention::Tensor4& tensor;
  int batch, head, low, high;  // keys outside [low, high) are seen by nobody
  bool ends_with_tensor;       // beyond `high` there is nothing: TMA gives zeros

  __device__ ValueLoader(const CUtensorMap& map_, const attention::Tensor4& tensor_, const Visibility& seen, int batch_,
                         int head_)
      : map(map_),
        tensor(tensor_),
        batch(batch_),
        head(head_),
        low(seen.begin(0)),
        high(seen.length),
        ends_with_tensor(seen.length == seen.keys) {}

  __device__ bool by_hand(int tile) const { return tile * keys < low || (tile * keys + keys > high && !ends_with_tensor); }

  // By the whole warp, when the stage is empty and what else the stage awaits has been announced.
  __device__ __forceinline__ void load(T* to, BarrierWord* full, int tile) const {
    if (by_hand(tile)) {
      load_panels_between<D, keys>(to, attention::matrix<T>(tensor, batch, head), tile * keys, low, high);
    } else if (threadIdx.x % 32 == 0) {
      load_panels<D, keys>(to, map, full, Keep::last, tile * keys, head, batch);
    }
  }
};

}  // namespace effcore::cuda::hopper
