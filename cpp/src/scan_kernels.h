// The contract between the baseline unit (how the work is cut into tasks) and the kernels compiled once for each instruction
// set. A kernel works on one sequence and one block of channels, a few vectors wide; T is float, or double for float64 tensors.
#pragma once
#include <cstdint>

#include "effcore/scan.h"

namespace effcore::scan {

struct Sequence {
  std::int64_t index, row, begin, end;
  std::int64_t first_state;  // row of `states` that holds the state before token `begin`
};

static inline Sequence sequence(const TensorView& x, const TensorView* offsets, std::int64_t s, std::int64_t keep) {
  const std::int64_t tokens = x.size[1], pieces = keep > 0 ? (tokens + keep - 1) / keep : 0;
  if (offsets == nullptr) return {s, s, 0, tokens, s * pieces};
  const auto* const at = static_cast<const std::int32_t*>(offsets->data);
  return {s, 0, at[s], at[s + 1], keep > 0 ? at[s] / keep + s : 0};
}

// Where a task of the backward adds up what it finds about parameters and about B and C: T, zeroed by the caller.
struct ScanSums {
  void *dA, *dD, *ddt_bias;  // [N][padded channels], [padded channels] twice
  void *dB, *dC;             // [B, tokens, N]
  std::int64_t channels;     // padded
};
struct ConvSums {
  void *dweight, *dbias;  // [K][padded channels], [padded channels]
  std::int64_t channels;
};

struct ScanKernels {
  std::int64_t block;  // channels
  void (*conv)(const CausalConv&, const Sequence&, std::int64_t first_channel);
  void (*scan)(const Scan&, const Sequence&, std::int64_t first_channel);
  void (*step)(const Step&, std::int64_t row, std::int64_t first_channel);
};
struct ScanBackwardKernels {
  std::int64_t block;
  void (*conv)(const CausalConvBackward&, const Sequence&, std::int64_t first_channel, const ConvSums&);
  void (*scan)(const ScanBackward&, const Sequence&, std::int64_t first_channel, const ScanSums&);
};

#define EFFCORE_DECLARE_KERNELS(ISA)                       \
  namespace ISA {                                          \
  const ScanKernels& scan_kernels(DType);                  \
  const ScanBackwardKernels& scan_backward_kernels(DType); \
  }
EFFCORE_DECLARE_KERNELS(v2)
EFFCORE_DECLARE_KERNELS(v3)
EFFCORE_DECLARE_KERNELS(v4)
#undef EFFCORE_DECLARE_KERNELS

}  // namespace effcore::scan
