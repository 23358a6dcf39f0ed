// Convolution with a cross-shaped kernel: a spatial one [kh, kw] in the middle frame and a temporal one [kt] in the middle
// pixel, added where they meet. kh * kw + kt - 1 taps where a dense kernel has kt * kh * kw: 11 instead of 27.
//
//   out[b, o, p] = bias[o] + sum over c, i, j of spatial[o, c, i, j] x[b, c, q + (kt / 2, i, j)]
//                          + sum over c, l of temporal[o, c, l] x[b, c, q + (l, kh / 2, kw / 2)],   q = stride * p - padding
//
// which is torch's Conv3d with the dense kernel that is zero off the cross, at any stride. Triples are (t, h, w).
//
// Tensors of voxels are [B, channels, T, H, W], contiguous along the channels (channels_last_3d, or a slice of it); kernels
// have any strides. All tensors of a call have one dtype. Sums are in float32 (float64 for float64 tensors).
#pragma once

#include "effcore/tensor.h"
#include "effcore/threads.h"

namespace effcore::conv3d {

struct Geometry {
  std::int64_t stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0};
};

struct Forward {
  TensorView x, spatial, temporal;   // [B, C, T, H, W], [O, C, kh, kw], [O, C, kt]
  const TensorView* bias = nullptr;  // [O], any stride
  Geometry geometry;
  TensorView out;  // [B, O, T', H', W']
};

struct BackwardData {
  TensorView dout, spatial, temporal;
  Geometry geometry;
  TensorView dx;
};

struct BackwardWeight {
  TensorView x, dout;
  Geometry geometry;
  TensorView dspatial, dtemporal;
};

// Positions of a kernel of this size along an input of `size`; below 1 where there is none.
constexpr std::int64_t positions(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t padding) {
  return (size + 2 * padding - kernel) / stride + (size + 2 * padding >= kernel ? 1 : 0);
}

// Throw std::invalid_argument naming `function` and the argument. check_kernels wants x checked, check_geometry the kernels.
void check_voxels(const char* function, const char* argument, const TensorView& voxels, const TensorView* like);
void check_kernels(const char* function, const TensorView& spatial, const TensorView& temporal, const TensorView& like);
void check_bias(const char* function, const TensorView& bias, const TensorView& spatial);
void check_geometry(const char* function, const Geometry& geometry);
// size: (T, H, W) of x; out receives the size of the output.
void check_positions(const char* function, const std::int64_t size[3], const std::int64_t kernel[3], const Geometry& geometry,
                     std::int64_t out[3]);
// Of a convolution whose stride is its kernel.
void check_patches(const char* function, const TensorView& x, const TensorView& weight);

void forward(const Forward& args, const Threads& threads);
void backward_data(const BackwardData& args, const Threads& threads);
void backward_weight(const BackwardWeight& args, const Threads& threads);

}  // namespace effcore::conv3d
