// The rows of a product on sm_90a: called by the host side of the family, which knows what else could serve.
#pragma once
#include <vector>

#include "conv3d/params.h"
#include "effcore/conv3d_taps.h"
#include "effcore/cuda/launch.h"

namespace effcore::cuda::conv3d::hopper {

// Position p of `to` [B, columns, T, H, W], of any strides, from step * p + the taps' offsets in `from`.
struct RowsProblem {
  TensorView from, to;
  std::vector<effcore::conv3d::PlacedTap> taps;
  std::int64_t step[3];
  TensorView spatial, temporal;  // kernels, of which dimension `channel` is that of `from`
  int channel;
  const void* packed;  // the same as [taps][columns][channels], or null: then only what needs no packing serves
  std::int64_t padded_columns, padded_channels, packed_taps;
  const TensorView* bias;
};

// Where a kernel's results go, and what is added to them.
template <class Params>
void set_results(Params& p, const RowsProblem& problem) {
  constexpr int order[4] = {0, 2, 3, 4};  // b, t, h, w
  p.columns = static_cast<int>(problem.to.size[1]);
  p.out = problem.to.data;
  for (int d = 0; d < 4; ++d) p.out_stride[d] = problem.to.stride[order[d]];
  if (problem.bias != nullptr) p.bias = problem.bias->data, p.bias_stride = problem.bias->stride[0];
}

// False where these kernels do not serve it (another dtype, rows that TMA cannot describe): nothing was launched then.
bool rows(const char* function, const RowsProblem& problem, const Launch& launch);

}  // namespace effcore::cuda::conv3d::hopper
