// Which of the compiled instruction sets serves a call: kernels are functions of the same name in the namespaces v2 to amx.
#pragma once
#include "effcore/cpu.h"

#if defined(__x86_64__)
#define EFFCORE_RETURN_VECTORS(function, dtype) \
  switch (isa()) {                              \
    case Isa::amx:                              \
    case Isa::bf16:                             \
    case Isa::v4: return v4::function(dtype);   \
    case Isa::v3: return v3::function(dtype);   \
    default: return v2::function(dtype);        \
  }
// Of a family with matrix products: these have engines of their own for bfloat16, and for it alone.
#define EFFCORE_RETURN_PRODUCTS(function, dtype)                                    \
  if (dtype == DType::bfloat16 && isa() == Isa::amx) return amx::function(dtype);   \
  if (dtype == DType::bfloat16 && isa() == Isa::bf16) return bf16::function(dtype); \
  EFFCORE_RETURN_VECTORS(function, dtype)
#else
#define EFFCORE_RETURN_VECTORS(function, dtype) return v2::function(dtype);
#define EFFCORE_RETURN_PRODUCTS(function, dtype) return v2::function(dtype);
#endif
