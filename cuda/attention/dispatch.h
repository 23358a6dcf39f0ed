// From an argument's dtype and head dimensions to the kernels that serve it: the one place where a path is chosen.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention/launch.h"
#ifdef EFFCORE_HOPPER
#include "attention/hopper/launch.h"
#endif
#include "common/path.h"
#include "effcore/error.h"

namespace effcore::cuda::attention {

// Head dimensions are padded to one of these with zeros, which changes no product.
constexpr int padded_dim(std::int64_t head_dim, std::int64_t value_dim) {
  const std::int64_t dim = std::max(head_dim, value_dim);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// Calls body(hopper::Kernels<T, D>{}), which says whether it launched; false where there are none for this GPU or dtype.
template <class T, int D, class Body>
bool try_hopper(Kernels<T, D>, const char* function, Body&& body) {
#ifdef EFFCORE_HOPPER
  if constexpr (sizeof(T) == 2)
    if (on_hopper(function)) return body(hopper::Kernels<T, D>{});
#endif
  return false;
}

// Calls body(Kernels<T, D>{}), the portable kernels for the problem.
template <class Body>
decltype(auto) dispatch(const Problem& p, const char* function, Body&& body) {
  const int dim = padded_dim(p.head_dim, p.value_dim);
#ifdef EFFCORE_CUDA_SET_CI
  if (p.dtype == DType::bfloat16 && dim == 64) return body(Kernels<bf16, 64>{});
  throw std::runtime_error(std::string("effcore.") + function +
                           ": this build (EFFCORE_CUDA_SET=ci) has bfloat16 kernels for head dimensions up to 64 alone");
#else
  const auto with_dim = [&]<class T>(T) -> decltype(auto) {
    return dim == 64 ? body(Kernels<T, 64>{}) : dim == 128 ? body(Kernels<T, 128>{}) : body(Kernels<T, 256>{});
  };
  switch (p.dtype) {
    case DType::bfloat16: return with_dim(bf16{});
    case DType::float16: return with_dim(fp16{});
    case DType::float32: return with_dim(float{});
    default:
      throw std::invalid_argument(std::string("effcore.") + function +
                                  ": float64 runs on the CPU alone; on a GPU use float32, bfloat16 or float16");
  }
#endif
}

}  // namespace effcore::cuda::attention
