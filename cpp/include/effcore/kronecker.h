// Sums of outer products of tokens, one matrix for each expert: the Kronecker factors of an expert's curvature.
//
// Tokens stand sorted by expert: offsets int32 [E + 1], contiguous, ascending, and expert e has the rows
// [offsets[e], offsets[e + 1]) of x. Rows before the first offset and behind the last belong to nobody. Two calls give the same
// bits, whatever the number of threads.
#pragma once
#include <cstdint>

#include "effcore/tensor.h"
#include "effcore/threads.h"

namespace effcore::kronecker {

// result[e] = alpha * x[e]^T x[e] + beta * previous[e], symmetric, in float32 (float64 for float64 tokens). Of `previous` the
// upper triangle is read; result and previous may be the same memory.
struct GroupedGram {
  TensorView x;        // [T, D], rows contiguous, any stride between them
  TensorView offsets;  // [E + 1]
  double alpha = 1.0, beta = 0.0;
  void* result = nullptr;          // [E, D, D], contiguous
  const void* previous = nullptr;  // as result; null where beta is 0
};

// Both throw std::invalid_argument with `function` in front. On the CPU the values of the offsets too.
void check_tokens(const char* function, const TensorView& x, const TensorView& offsets);
// A contiguous [E, D, D] in the dtype of the result, on the device of x.
void check_gram(const char* function, const TensorView& out, const TensorView& x, const TensorView& offsets);

void grouped_gram(const GroupedGram& args, const Threads& threads);

}  // namespace effcore::kronecker
