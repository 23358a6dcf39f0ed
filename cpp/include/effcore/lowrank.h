// A linear layer whose weight is a product of two thin matrices: out = f(x downᵀ upᵀ + bias).
//
// x [rows, in], down [rank, in], up [out, rank]; each may have any row stride, its last dimension is contiguous. float32,
// bfloat16, float16 (float64 on the CPU). Sums are float32 (float64). Two calls give the same bits, whatever the number of
// threads.
#pragma once
#include <cstdint>
#include <span>

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

// Shapes for which a kernel is faster than two products of a library: a box, measured. A few of them, constants of the machine
// and the dtype, make the choice: it depends on shapes alone.
struct Limits {
  static constexpr std::int64_t any = std::int64_t{1} << 40;
  std::int64_t least_rows = 1, most_rows = 0;
  std::int64_t least_bytes = 0;  // of both factors
  std::int64_t least_rank = 0, most_rank = any;
  std::int64_t least_in = 0, most_in = any, least_out = 0, most_out = any;
};
inline bool within(std::span<const Limits> boxes, DType dtype, std::int64_t rows, std::int64_t in, std::int64_t rank,
                   std::int64_t out) {
  const std::int64_t bytes = rank * (in + out) * (dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2);
  for (const Limits& b : boxes)
    if (rows >= b.least_rows && rows <= b.most_rows && bytes >= b.least_bytes && rank >= b.least_rank && rank <= b.most_rank &&
        in >= b.least_in && in <= b.most_in && out >= b.least_out && out <= b.most_out)
      return true;
  return false;
}

// Where `linear` is the faster way: the library packs the weights first.
std::span<const Limits> limits(DType dtype);

void linear(const Linear& args, const Threads& threads);
void activate(const Activate& args, const Threads& threads);
void activate_backward(const ActivateBackward& args, const Threads& threads);

}  // namespace effcore::lowrank
