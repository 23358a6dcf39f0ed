// Products of 64 rows by numbers of columns that are no power of two, for tiles that fit a problem exactly.
#pragma once
#include "hopper/wgmma.cuh"

// Needs what the other declares.
#include <cute/arch/mma_sm90_gmma_ext.hpp>

namespace effcore::cuda::hopper {

#define EFFCORE_WGMMA(N)                                       \
  template <gmma::Major a, gmma::Major b>                      \
  struct Instruction<bf16, N, a, b> {                          \
    using Shared = gmma::MMA_64x##N##x16_F32BF16BF16_SS<a, b>; \
  };                                                           \
  template <gmma::Major a, gmma::Major b>                      \
  struct Instruction<fp16, N, a, b> {                          \
    using Shared = gmma::MMA_64x##N##x16_F32F16F16_SS<a, b>;   \
  };
EFFCORE_WGMMA(200)
EFFCORE_WGMMA(208)
EFFCORE_WGMMA(216)
EFFCORE_WGMMA(224)
#undef EFFCORE_WGMMA

}  // namespace effcore::cuda::hopper
