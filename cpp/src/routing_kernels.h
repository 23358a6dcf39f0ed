// The contract between the baseline units (checks, tasks, threads) and the row kernels compiled once for each instruction set.
// All of them work on one row; T is float, or double for float64 tensors.
#pragma once
#include <cstdint>

#include "effcore/routing.h"

namespace effcore::routing {

struct RowKernels {
  // to[0, n) as T
  void (*load)(void* to, const void* from, std::int64_t n);
  void (*store)(void* to, const void* sums, std::int64_t n);
  // sums += row
  void (*add)(void* sums, const void* row, std::int64_t n);
  // out = a + b (+ c where not null), rounded once
  void (*sum)(void* out, const void* a, const void* b, const void* c, std::int64_t n);
  // probs[0, tokens) += softmax(scale * q . k[n]) / heads, with `scores` [tokens] of T as scratch memory
  void (*score)(void* probs, void* scores, const void* q, const void* k, std::int64_t k_stride, std::int64_t tokens,
                std::int64_t dim, double scale, double weight);
  // kept [keep] and rest get the partition of scores [tokens] of T; keys [tokens] of T's size is scratch memory
  void (*select)(const void* scores, std::int64_t tokens, std::int64_t keep, std::int64_t protect, void* keys,
                 std::int32_t* kept, std::int32_t* rest);
  // normed = xhat * weight + bias; statistics are written. x [n] of T.
  void (*norm)(void* normed, const void* x, const void* weight, const void* bias, std::int64_t n, double eps, bool rms,
               void* mean, void* rstd);
  // sums += the gradient of `norm` at row x; dweight += dnormed * xhat; dbias += dnormed (or null). g [n], xhat [n] scratch of
  // T.
  void (*norm_backward)(void* sums, const void* x, const void* dnormed, const void* weight, std::int64_t n, bool rms,
                        const void* mean, const void* rstd, void* dweight, void* dbias, void* g, void* xhat);
};

namespace v2 {
const RowKernels& row_kernels(DType dtype);
}
namespace v3 {
const RowKernels& row_kernels(DType dtype);
}
namespace v4 {
const RowKernels& row_kernels(DType dtype);
}

// The ones for this machine.
const RowKernels& row_kernels(DType dtype);
}  // namespace effcore::routing
