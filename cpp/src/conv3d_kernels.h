// The contract between the baseline unit (plan, threads) and the kernels compiled once for each instruction set.
//
// All three directions are matrix products with a gathered operand G [rows, depth]: a row is a position, and its depth the
// channels of each tap, one after the other, in ascending order of place. Forward: out = G(x) W. Gradient of the data: dx =
// G(dout) W^T with the taps mirrored, once for each residue of the position modulo the stride (at stride 1 there is one).
// Gradient of the weights: dW^T = dout^T G(x). G is made block by block in the caches, never in memory.
//
// Rows are numbered by plane (one t), then batch row, h, w: in a plane the same taps lie in frames that do not exist, and
// being at one end of the depth they are left out of the product.
#pragma once
#include <cstdint>

#include "effcore/conv3d.h"
#include "effcore/conv3d_taps.h"

namespace effcore::conv3d {

// Taps that are neighbours along w, so that their channels lie on end in memory.
struct Run {
  std::int64_t offset[3];  // of its first tap, from step * position
  std::int64_t taps;
};

struct Gather {
  TensorView from;
  std::int64_t grid[3];              // positions
  std::int64_t step[3] = {1, 1, 1};  // of `from` between two positions
  const Run* runs = nullptr;
  std::int64_t run_count = 0, taps = 0;
};

// The kernels as the matrix [taps * channels, columns]: `channel` is the dimension of the kernels (0 or 1) that the gathered
// tensor has, the other one makes the columns.
struct WeightsJob {
  TensorView spatial, temporal;
  const Tap* taps = nullptr;
  std::int64_t tap_count = 0;
  int channel = 1;
  void* rows = nullptr;    // the matrix, row-major, in the kernels' dtype
  void* packed = nullptr;  // and as the product takes it
};

struct RowsJob {
  Gather gather;
  const void* packed = nullptr;
  const TensorView* bias = nullptr;
  TensorView to;  // [B, columns, T, H, W]; position p is written to origin + to_step * p
  std::int64_t origin[3] = {0, 0, 0}, to_step[3] = {1, 1, 1};
  std::int64_t block_rows = 0, blocks = 0;  // of a plane
};

// The depth is cut into `chunks` and the rows into `splits`; each pair of them is a task with its own sums [columns, chunk].
struct WeightGradientJob {
  Gather gather;
  TensorView dout;
  const Tap* taps = nullptr;
  TensorView dspatial, dtemporal;
  std::int64_t blocks = 0;  // of a plane
  std::int64_t chunks = 0, splits = 0;
  char* partial = nullptr;
};

struct Kernels {
  std::int64_t row_multiple;  // of rows in a block of a RowsJob
  std::int64_t gradient_rows, gradient_chunk;
  std::int64_t (*packed_bytes)(std::int64_t depth, std::int64_t columns);
  std::int64_t (*partial_bytes)(std::int64_t columns);
  void (*arrange)(const WeightsJob&, std::int64_t task);         // weight_channels channels a task
  void (*pack)(const WeightsJob&, std::int64_t task);            // pack_depth rows of the matrix a task
  void (*rows)(const RowsJob&, std::int64_t task);               // plane * blocks + block
  void (*weights)(const WeightGradientJob&, std::int64_t task);  // split * chunks + chunk
  void (*reduce)(const WeightGradientJob&, std::int64_t task);   // weight_channels channels a task
};

constexpr std::int64_t weight_channels = 16, pack_depth = 128;

namespace v2 {
const Kernels& kernels(DType dtype);
}
namespace v3 {
const Kernels& kernels(DType dtype);
}
namespace v4 {
const Kernels& kernels(DType dtype);
}
namespace bf16 {
const Kernels& kernels(DType dtype);  // bfloat16 alone
}
namespace amx {
const Kernels& kernels(DType dtype);  // bfloat16 alone
}

}  // namespace effcore::conv3d
