// Convolution and selective scan on NVIDIA GPUs (sm_80 and later): the functions of effcore/scan.h with the same arguments,
// which the caller has checked, but for the values of offsets. float64 is refused. `keep` is a multiple of 8. The backward for
// more than 64 states needs 137 KiB of shared memory (sm_80, sm_90), for fewer 50 to 80; the forward up to 97. Two runs on one
// GPU give identical bits. A failing launch throws std::runtime_error.
#pragma once
#include <cstddef>

#include "effcore/cuda/launch.h"
#include "effcore/scan.h"

namespace effcore::cuda::scan {

using effcore::scan::CausalConv;
using effcore::scan::CausalConvBackward;
using effcore::scan::Scan;
using effcore::scan::ScanBackward;
using effcore::scan::Step;

std::size_t workspace_bytes(const CausalConv& args);
std::size_t workspace_bytes(const CausalConvBackward& args);
std::size_t workspace_bytes(const Scan& args);
std::size_t workspace_bytes(const ScanBackward& args);
std::size_t workspace_bytes(const Step& args);

void causal_conv(const CausalConv& args, const Launch& launch);
void causal_conv_backward(const CausalConvBackward& args, const Launch& launch);
void selective_scan(const Scan& args, const Launch& launch);
void selective_scan_backward(const ScanBackward& args, const Launch& launch);
void selective_step(const Step& args, const Launch& launch);

// Which kernels serve this dtype on the current GPU, for `effcore doctor`: "sm_80" (no products), or "none: " and why.
const char* path(DType dtype);

}  // namespace effcore::cuda::scan
