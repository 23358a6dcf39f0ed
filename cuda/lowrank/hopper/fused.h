// The fused kernel's interface to the rest of the library, which is compiled for other architectures too.
#pragma once
#include "effcore/cuda/launch.h"
#include "effcore/lowrank.h"

namespace effcore::cuda::lowrank::hopper {

using effcore::lowrank::Activation;

// out [rows, columns] = f(x first second + bias), with first as [rank, depth] and second as [columns, rank] in memory, or
// `transposed`: as [depth, rank] and [rank, columns]. Rows start at multiples of 16 bytes.
struct FusedProblem {
  TensorView x, first, second, out;
  bool transposed;
  const void* bias = nullptr;
  void *hidden = nullptr, *before = nullptr;  // contiguous [rows, rank], [rows, columns], or null
  Activation activation = Activation::none;
};

constexpr int most_rank = 256;

// For each dtype (instances/). False where the copy engine does not take the problem's memory; nothing has been launched then.
template <class T>
bool fused_instance(const FusedProblem& problem, const Launch& launch);

}  // namespace effcore::cuda::lowrank::hopper
