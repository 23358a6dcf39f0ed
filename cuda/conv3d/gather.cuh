// Blocks of the gathered operand in shared memory: rows of 128 bytes of channels of one tap, zeros outside the tensor.
#pragma once
#include "common/tile.cuh"
#include "conv3d/params.h"

namespace effcore::cuda::conv3d {

// Elements in a row of a tile: 128 bytes.
template <class T>
constexpr int segment = 128 / static_cast<int>(sizeof(T));

struct Position {
  int t, b, h, w;
};

__device__ __forceinline__ Position position_of(const GatherParams& g, int row) {
  Position p;
  p.t = g.plane.take(row);
  p.b = g.frame.take(row);
  p.h = g.width.take(row);
  p.w = row;
  return p;
}

__device__ __forceinline__ bool sees(const GatherParams& g, const Position& p, const TapOffset& tap) {
  const unsigned t = p.t * g.step[0] + tap.t, h = p.h * g.step[1] + tap.h, w = p.w * g.step[2] + tap.w;
  return t < static_cast<unsigned>(g.size[0]) && h < static_cast<unsigned>(g.size[1]) && w < static_cast<unsigned>(g.size[2]);
}

__device__ __forceinline__ std::int64_t place_of(const GatherParams& g, const Position& p) {
  return p.b * g.stride[0] + p.t * (g.step[0] * g.stride[1]) + p.h * (g.step[1] * g.stride[2]) +
         p.w * (g.step[2] * g.stride[3]);
}
__device__ __forceinline__ std::int64_t distance_of(const GatherParams& g, const TapOffset& tap) {
  return tap.t * g.stride[1] + tap.h * g.stride[2] + tap.w * g.stride[3];
}

// One 16-byte piece of a row, channels [channel, channel + 16 / sizeof(T)): what is not valid, or beyond the channels, is zero.
template <class T>
__device__ __forceinline__ void load_piece(const Tile<T, segment<T>>& tile, int row, int column, const T* data,
                                           std::int64_t place, int channel, int channels, bool valid, bool aligned) {
  constexpr int piece = 16 / static_cast<int>(sizeof(T));
  if (aligned) {
    valid = valid && channel < channels;
    async_copy_16(shared_address(tile.at(row, column)), valid ? data + place + channel : data, valid);
  } else {
#pragma unroll
    for (int e = 0; e < piece; ++e)
      *tile.at(row, column + e) = valid && channel + e < channels ? data[place + channel + e] : from_float<T>(0.0f);
  }
}

}  // namespace effcore::cuda::conv3d
