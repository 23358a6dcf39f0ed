// A linear layer whose weight is a product of two thin matrices: out = f(x downᵀ upᵀ + bias).
//
// x [rows, in], down [rank, in], up [out, rank]; each may have any row stride, its last dimension is contiguous. float32,
// bfloat16, float16 (float64 on the CPU). Sums are float32 (float64). Two calls give the same bits, whatever the number of
// threads.
#pragma once
#include <cstdint>

#include "effcore/tensor.h"
#include "effcore/threads.h"

namespace effcore::lowrank {

// gelu is x Φ(x) with the normal distribution's Φ; gelu_tanh its usual approximation; silu is x / (1 + e^-x).
enum class Activation : std::int8_t { none, relu, gelu, gelu_tanh, silu };
constexpr int activations = 5;

struct Linear {
  TensorView x;                      // [rows, in]
  TensorView down;                   // [rank, in]
  TensorView up;                     // [out, rank]
  const TensorView* bias = nullptr;  // [out], in x's dtype
  Activation activation = Activation::none;
  TensorView out;          // [rows, out]
  void* hidden = nullptr;  // [rows, rank] contiguous in x's dtype, x downᵀ as the backward needs it; or null
  void* before = nullptr;  // [rows, out] contiguous in x's dtype, the activation's argument; or null
};

// out = f(in), [rows, columns]; `out` may be `in`
struct Activate {
  TensorView in;
  TensorView out;
  Activation activation = Activation::none;
};

// dz = dout * f'(before); relu takes its own result for `before` just as well
struct ActivateBackward {
  TensorView dout;
  TensorView before;
  TensorView dz;
  Activation activation = Activation::none;
};

// dhidden = dz up, dx = dhidden down
struct InputGradient {
  TensorView dz;            // [rows, out]
  TensorView down;          // [rank, in]
  TensorView up;            // [out, rank]
  TensorView dx;            // [rows, in]
  void* dhidden = nullptr;  // [rows, rank] contiguous in dz's dtype, or null
};

// Throw std::invalid_argument with `function` in front.
void check_linear(const char* function, const TensorView& x, const TensorView& down, const TensorView& up,
                  const TensorView* bias, std::int64_t activation);
void check_like(const char* function, const char* argument, const TensorView& t, const TensorView& like, std::int64_t rows,
                std::int64_t columns);

// Where `linear` is faster than two products of a library, which packs the weights first: measured, and constants of the
// machine and the dtype, so that a choice depends on shapes alone.
struct Limits {
  std::int64_t least_rows = 1, most_rows = 0;
  std::int64_t least_bytes = 0;  // of both factors
  std::int64_t most_rank = std::int64_t{1} << 40;
};
Limits limits(DType dtype);
inline bool within(const Limits& limits, const Linear& args) {
  const std::int64_t rows = args.x.size[0], rank = args.down.size[0], features = args.x.size[1] + args.up.size[0];
  const std::int64_t size = args.x.dtype == DType::float64 ? 8 : args.x.dtype == DType::float32 ? 4 : 2;
  return rows >= limits.least_rows && rows <= limits.most_rows && rank <= limits.most_rank &&
         rank * features * size >= limits.least_bytes;
}

void linear(const Linear& args, const Threads& threads);
void activate(const Activate& args, const Threads& threads);
void activate_backward(const ActivateBackward& args, const Threads& threads);

}  // namespace effcore::lowrank
