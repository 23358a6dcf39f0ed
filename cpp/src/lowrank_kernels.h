// The contract between the baseline units of the lowrank family and the kernels compiled once for each instruction set.
#pragma once
#include <cstdint>

#include "effcore/lowrank.h"

namespace effcore::lowrank {

// A product of few rows with many: c[m, n] = rows[m] · weights[n] over k, for weights n of one task.
struct Product {
  const void* operand;  // the rows, as `prepare` made them
  std::int64_t rows;
  const char* weights;  // [n, k]
  std::int64_t weight_stride;
  std::int64_t columns, k;  // columns: all weights
  const void* bias = nullptr;
  Activation activation = Activation::none;
  void* sums = nullptr;    // c as float (double), or null
  void* before = nullptr;  // c + bias in the tensors' dtype, or null
  void* out = nullptr;     // f(c + bias) in the tensors' dtype, or null
  std::int64_t sums_stride = 0, before_stride = 0, out_stride = 0;
};

struct ProductKernels {
  std::int64_t block;      // weights of one task
  bool operand_from_sums;  // the operand is made of float sums rather than of rows in the tensors' dtype
  std::int64_t (*operand_bytes)(std::int64_t rows, std::int64_t k);
  // rows [m, k] in the tensors' dtype
  void (*prepare)(void* operand, const void* rows, std::int64_t stride, std::int64_t m, std::int64_t k);
  void (*multiply)(const Product&, std::int64_t task);
};

struct ActivationKernels {
  void (*activate)(void* out, const void* in, std::int64_t n, Activation activation);
  void (*backward)(void* dz, const void* dout, const void* before, std::int64_t n, Activation activation);
};

namespace v2 {
const ProductKernels& product_kernels(DType dtype);
const ActivationKernels& activation_kernels(DType dtype);
}  // namespace v2
namespace v3 {
const ProductKernels& product_kernels(DType dtype);
const ActivationKernels& activation_kernels(DType dtype);
}  // namespace v3
namespace v4 {
const ProductKernels& product_kernels(DType dtype);
const ActivationKernels& activation_kernels(DType dtype);
}  // namespace v4
namespace bf16 {
const ProductKernels& product_kernels(DType dtype);  // bfloat16 alone
}
namespace amx {
const ProductKernels& product_kernels(DType dtype);  // bfloat16 alone
}

}  // namespace effcore::lowrank
