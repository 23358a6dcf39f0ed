// Which engine computes a dtype in this unit.
#pragma once
#include "engine.h"
#include "engine_pairs.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

// Family<E>::kernels of the engine for this dtype.
template <template <class> class Family>
inline const auto& choose(DType dtype) {
#if defined(__AVX512BF16__)
  (void)dtype;  // the baseline unit asks these units for bfloat16 alone
  return Family<Pairs>::kernels;
#else
  switch (dtype) {
    case DType::float64: return Family<Simd<double, double> >::kernels;
    case DType::bfloat16: return Family<Simd<bfloat16, float> >::kernels;
    case DType::float16: return Family<Simd<float16, float> >::kernels;
    default: return Family<Simd<float, float> >::kernels;
  }
#endif
}

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
