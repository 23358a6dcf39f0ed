// A low-rank linear layer on NVIDIA GPUs: the functions of effcore/lowrank.h with the same arguments, which the caller has
// checked. float64 is refused. Two runs give identical bits. A failing launch throws std::runtime_error.
#pragma once
#include "effcore/cuda/launch.h"
#include "effcore/lowrank.h"

namespace effcore::cuda::lowrank {

using effcore::lowrank::Activate;
using effcore::lowrank::ActivateBackward;
using effcore::lowrank::InputGradient;
using effcore::lowrank::Limits;
using effcore::lowrank::Linear;

// Where `linear` beats two products of cuBLAS, on the current device; nowhere on one that has no kernel.
// EFFCORE_LOWRANK_EVERYWHERE=1: wherever it can run, for tests and benchmarks.
std::span<const Limits> limits(DType dtype);
// Whether the kernel can take this problem's memory: rows at multiples of 16 bytes.
bool takes(const Linear& args);
// The same, and whether it is the faster way. dx and dhidden are not looked at.
bool takes(const InputGradient& args);

void linear(const Linear& args, const Launch& launch);
void input_gradient(const InputGradient& args, const Launch& launch);
void activate(const Activate& args, const Launch& launch);
void activate_backward(const ActivateBackward& args, const Launch& launch);

// Which kernels serve this dtype on the current GPU, for `effcore doctor`: "wgmma sm_90a" (within
// `limits`), "cublas" (two products, our activation), or "none: " and why.
const char* path(DType dtype);

}  // namespace effcore::cuda::lowrank
