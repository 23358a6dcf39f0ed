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

// Which kernels serve this dtype on the current GPU, for `effcore doctor`: "wgmma sm_90a" (where the
// arguments allow it; else as on other GPUs), "mma sm_80", "fma sm_80", or "none: " and why.
const char* path(DType dtype);

}  // namespace effcore::cuda::conv3d
