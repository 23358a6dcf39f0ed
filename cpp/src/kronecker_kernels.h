// The contract between the baseline unit (segments, tasks, threads) and the Gram kernels compiled once for each instruction
// set.
#pragma once
#include <cstdint>

#include "effcore/kronecker.h"

namespace effcore::kronecker {

// Tokens [begin, end) of an expert, packed once and then multiplied block by block. An expert with many tokens has several
// segments; each adds `beta` times what `previous` holds.
struct Segment {
  std::int64_t expert = 0, begin = 0, end = 0;
  const void* previous = nullptr;  // the expert's [D, D], or null
  double beta = 0.0;
  char* packed = nullptr;
};

struct GramJob {
  TensorView x;
  double alpha = 1.0;
  void* result = nullptr;  // [E, D, D]
  bool streams = false;    // the result is too large to be found in the caches later
};

struct GramKernels {
  std::int64_t (*packed_bytes)(std::int64_t tokens, std::int64_t dim);
  // Packs tokens [first, first + gram_pack) of the segment, first a multiple of gram_pack.
  void (*pack)(const GramJob&, const Segment&, std::int64_t first);
  // Rows [row, row + gram_block) and columns [column, column + gram_block) of the upper triangle, and their mirror.
  void (*block)(const GramJob&, const Segment&, std::int64_t row, std::int64_t column);
};

constexpr std::int64_t gram_block = 256, gram_pack = 256;

namespace v2 {
const GramKernels& gram_kernels(DType dtype);
}
namespace v3 {
const GramKernels& gram_kernels(DType dtype);
}
namespace v4 {
const GramKernels& gram_kernels(DType dtype);
}
namespace bf16 {
const GramKernels& gram_kernels(DType dtype);  // bfloat16 alone
}
namespace amx {
const GramKernels& gram_kernels(DType dtype);  // bfloat16 alone
}

}  // namespace effcore::kronecker
