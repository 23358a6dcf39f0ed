// TMA descriptors of [B, heads, tokens, dim] tensors, made on the host at each launch and passed by value.
#pragma once
#include <cuda.h>

#include "attention/params.h"
#include "effcore/tensor.h"

namespace effcore::cuda::hopper {

// Boxes of `rows` tokens x 64 columns in the 128-byte swizzle; tokens and columns beyond the tensor read as zeros. False where
// the tensor has no such descriptor (rows that do not start at multiples of 16 bytes, a driver without TMA).
bool make_tensor_map(CUtensorMap* map, const attention::Tensor4& tensor, DType dtype, int batch, int heads, int tokens,
                     int rows);

// Kept probabilities: `tiles` tiles of 64 x 64, one below the other; boxes of `box_rows` rows.
bool make_probs_map(CUtensorMap* map, const void* probs, DType dtype, std::int64_t tiles, int box_rows = attention::probs_tile);

}  // namespace effcore::cuda::hopper
