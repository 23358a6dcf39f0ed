// The cross-shaped convolution on NVIDIA GPUs (sm_80 and later): the functions of effcore/conv3d.h with the same arguments,
// which the caller has checked. float64 and kernels of more than 128 taps are refused. Two runs give identical bits. A failing
// launch throws std::runtime_error.
#pragma once
#include <cstddef>

#include "effcore/conv3d.h"
#include "effcore/cuda/launch.h"

namespace effcore::cuda::conv3d {

using effcore::conv3d::BackwardData;
using effcore::conv3d::BackwardWeight;
using effcore::conv3d::Forward;

std::size_t workspace_bytes(const Forward& args);
std::size_t workspace_bytes(const BackwardData& args);
std::size_t workspace_bytes(const BackwardWeight& args);

void forward(const Forward& args, const Launch& launch);
void backward_data(const BackwardData& args, const Launch& launch);
void backward_weight(const BackwardWeight& args, const Launch& launch);

// A convolution whose stride is its kernel, without padding (the patch embedding of video transformers): x [B, C, T, H, W],
// weight [O, C, kt, kh, kw], contiguous, out [B, O, T / kt, H / kh, W / kw], contiguous but for its channels, which are inside.
struct Patches {
  TensorView x, weight;
  const TensorView* bias = nullptr;  // [O]
  TensorView out;
};

// On sm_90a alone, in bfloat16 and float16: patches are read where they lie. Their lines are dense, a multiple of 16 voxels
// long and begin at multiples of 16 bytes, O is a multiple of 8, and the bias is dense; all else is refused.
void patches(const Patches& args, const Launch& launch);

// Which kernels serve this dtype on the current GPU, for `effcore doctor`: "wgmma sm_90a" (where the
// arguments allow it; else as on other GPUs), "mma sm_80", "fma sm_80", or "none: " and why.
const char* path(DType dtype);

}  // namespace effcore::cuda::conv3d
