// What the kernels of the conv3d family are given.
#pragma once
#include <cstdint>

namespace effcore::cuda::conv3d {

constexpr int max_taps = 128;

// Division by a number known before the launch: n / divisor for 0 <= n < 2^31.
struct Divider {
  std::uint32_t divisor = 1, multiplier = 0, shift = 0;

  Divider() = default;
  explicit Divider(std::int64_t d) : divisor(static_cast<std::uint32_t>(d)) {
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
#if defined(__CUDACC__)
  // Sets n to the remainder.
  __device__ __forceinline__ int take(int& n) const {
    const std::uint32_t q = (__umulhi(static_cast<std::uint32_t>(n), multiplier) + static_cast<std::uint32_t>(n)) >> shift;
    n -= static_cast<int>(q * divisor);
    return static_cast<int>(q);
  }
#endif
};

// A tap: its offset from step * position in the gathered tensor, and its place among the packed weights.
struct TapOffset {
  std::int16_t t, h, w, number;
};

// The gathered operand G [rows, taps * channels] (cpp/src/conv3d_kernels.h). Rows are numbered by t, batch row, h, w.
struct GatherParams {
  const void* data;
  std::int64_t stride[4];  // b, t, h, w
  int channels, size[3], step[3];
  int rows;
  Divider plane, frame, width;  // rows of a plane, of a batch row in it, and of a line
  bool aligned;                 // 16-byte pieces of channels are aligned and whole
  int taps;
  TapOffset tap[max_taps];
};

// The kernels as [taps][columns][channels], both padded with zeros.
struct PackParams {
  const void *spatial, *temporal;
  std::int64_t spatial_column, spatial_channel, temporal_column, temporal_channel;  // strides
  int columns, channels, padded_columns, padded_channels, taps;
  int spatial_tap[max_taps], temporal_tap[max_taps];  // elements, -1 for none
  void* packed;
};

struct RowsParams {
  GatherParams gather;
  const void* packed;
  int padded_columns, padded_channels;
  const void* bias;  // or null
  std::int64_t bias_stride;
  void* out;
  std::int64_t out_stride[4];  // b, t, h, w
  int origin[3], out_step[3];
  int columns;
  bool out_aligned;
};

struct WeightsParams {
  GatherParams gather;  // of x
  const void* dout;
  std::int64_t dout_stride[4];
  int columns;
  bool dout_aligned;
  int column_blocks, segments, splits, steps;  // steps: blocks of rows
  float* partial;                              // [splits][padded columns][padded segments]
};

struct ReduceParams {
  const float* partial;
  int splits, padded_columns, padded_depth, padded_channels;  // [splits][padded_columns][padded_depth: taps, padded_channels]
  bool tiles;                                                 // or in tiles of 64 x 64 (hopper/weights.h)
  int parts;                                                  // see reduce_kernel
  int columns, channels, taps;
  std::int64_t spatial_column, spatial_channel, temporal_column, temporal_channel;
  int spatial_tap[max_taps], temporal_tap[max_taps];
  void *dspatial, *dtemporal;
};

}  // namespace effcore::cuda::conv3d
