// The attention family on NVIDIA GPUs (sm_80 and later): the functions of effcore/attention.h with the same arguments, which
// the caller has checked. float64 is refused. Two runs give identical bits. A failing launch throws std::runtime_error.
#pragma once
#include <cstddef>

#include "effcore/attention.h"
#include "effcore/cuda/launch.h"

namespace effcore::cuda::attention {

using effcore::attention::Backward;
using effcore::attention::Decode;
using effcore::attention::DecodeFromProbs;
using effcore::attention::Forward;
using effcore::attention::Problem;
using effcore::attention::SharedBackward;
using effcore::attention::SharedForward;

// Layers whose gradients one Backward can take.
constexpr int max_layers = 32;

std::size_t workspace_bytes(const Forward& args);
std::size_t workspace_bytes(const SharedForward& args);
std::size_t workspace_bytes(const SharedBackward& args);
std::size_t workspace_bytes(const Backward& args);
std::size_t workspace_bytes(const Decode& args);
std::size_t workspace_bytes(const DecodeFromProbs& args);

void forward(const Forward& args, const Launch& launch);
void shared_forward(const SharedForward& args, const Launch& launch);
void shared_backward(const SharedBackward& args, const Launch& launch);
void backward(const Backward& args, const Launch& launch);
void decode(const Decode& args, const Launch& launch);
void decode_from_probs(const DecodeFromProbs& args, const Launch& launch);

// Fills the tensor with NaN where one of the float32 scalars on the device exceeds 1 (a SharedScores that two layers used).
void spoil_if_reused(const float* const* uses, int count, const TensorView& tensor, const Launch& launch);

// Which kernels serve this dtype on the current GPU, for `effcore doctor`: "wgmma sm_90a" (tensors that TMA cannot
// address, decoding, and backwards of other head dimensions than 64 and 128 take "mma sm_80"), "mma sm_80", "fma sm_80", or
// "none: " and why.
const char* path(DType dtype);

}  // namespace effcore::cuda::attention
