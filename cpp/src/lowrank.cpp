// A low-rank linear layer of few rows on the CPU: which kernels serve it, and how its weights are cut into tasks.
//
// Bound: bytes. Both factors are read once and hardly anything else is: rank (in + out) elements for 2 rows rank (in + out)
// operations. A library packs the weights first, which for few rows costs more than multiplying them.
#include "effcore/lowrank.h"

#include <algorithm>
#include <cstring>

#include "choose.h"
#include "lowrank_kernels.h"
#include "scratch.h"
#include "tasks.h"

namespace effcore::lowrank {
namespace {

// Less than this of weights or of elements is work for one thread: waking another takes some microseconds.
constexpr std::int64_t serial_bytes = 96 << 10;

std::int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}
std::int64_t sum_size(DType dtype) {
  return dtype == DType::float64 ? 8 : 4;
}
std::int64_t round_up(std::int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}
std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

const ProductKernels& product_kernels(DType dtype) {
  EFFCORE_RETURN_PRODUCTS(product_kernels, dtype)
}

const ActivationKernels& activation_kernels(DType dtype) {
  EFFCORE_RETURN_VECTORS(activation_kernels, dtype)
}

constexpr std::int64_t mib = 1 << 20;

// Where `linear` is faster than torch's two products, measured on 2 cores of a Xeon with AMX. Tiles gain 1.5-2x up to 16 rows
// and 1.2-1.5x at 64, which is as far as the running sums stay in the cache; float16 gains 1.3-1.9x from 4 rows to 16, 1.0-1.2x
// at one. MKL multiplies a few rows of float32 out of the cache as fast as they come; it loses from 4 rows on where the factors
// do not fit (0.94-1.1x at 2 to 2.5 MiB, 1.05-1.2x at 4 to 6, 1.3-1.4x at 8): the limit lies between 2.5 and 4 MiB.
constexpr Limits few_for_tiles[] = {{.most_rows = 64}};
constexpr Limits few[] = {{.most_rows = 16}};
constexpr Limits few_beyond_the_cache[] = {{.least_rows = 4, .most_rows = 16, .least_bytes = 3 * mib}};

// The same of an EPYC (Zen 5). bfloat16 gains 1.2-3x up to 16 rows, as above; float32 1.2-3.6x from 2 rows to 16, 1.0-1.8x from
// 64 to 256, float64 1.0-3x. One row gains as much where the factors are large enough to share out: float32 1.2-2.7x from 0.25
// MiB on (0.8-0.95x at rank 32, whose rows of weights are too short), float64 1.1-2.4x from 0.19. Nothing of torch's is made
// for more than one row of float16: 1.5-3x at 2 and 4 rows, 4-7x at 16, 6-12x from 64 to 1024. At one, 1.03-1.6x up to rank 64,
// and 0.85-1.2x beyond.
constexpr Limits amd_float16[] = {{.least_rows = 2, .most_rows = 1024},
                                  {.most_rows = 1, .least_bytes = mib / 32, .most_rank = 64}};
constexpr Limits amd_float32[] = {{.least_rows = 2, .most_rows = 256},
                                  {.most_rows = 1, .least_bytes = mib / 4, .least_rank = 48}};
constexpr Limits amd_float64[] = {{.least_rows = 2, .most_rows = 32}, {.most_rows = 1, .least_bytes = 3 * mib / 16}};
// And on it with the kernels of AVX2 (EFFCORE_ISA=v3), which a Zen 2 or 3 takes.
constexpr Limits amd_float16_avx2[] = {{.most_rows = 128}};
constexpr Limits amd_float32_avx2[] = {{.least_rows = 2, .most_rows = 4}, {.most_rows = 32, .least_bytes = 3 * mib / 2}};
constexpr Limits amd_float64_avx2[] = {{.most_rows = 8, .least_bytes = 3 * mib}};

void multiply(const ProductKernels& kernels, const Product& product, std::int64_t weight_bytes, const Threads& threads) {
  const auto task = [&](std::int64_t i) { kernels.multiply(product, i); };
  const std::int64_t tasks = ceil_div(product.columns, kernels.block);
  if (weight_bytes * std::min<std::int64_t>(product.rows, 8) > serial_bytes) return run_tasks(threads, tasks, task);
  for (std::int64_t i = 0; i < tasks; ++i) task(i);
}

// Rows of [rows, columns] over the threads, in one piece each where neighbouring rows are neighbours in memory.
template <class Body>
void for_rows(const TensorView& t, bool dense, const Threads& threads, const Body& body) {
  const std::int64_t rows = t.size[0], columns = t.size[1];
  if (rows * columns == 0) return;
  // A piece of a dense tensor is any run of elements: few long rows share out as well as many short ones.
  constexpr std::int64_t piece = 4096;
  const std::int64_t items = dense ? ceil_div(rows * columns, piece) : rows;
  const auto some = [&](std::int64_t begin, std::int64_t end) {
    if (dense) return body(0, begin * piece, std::min(end * piece, rows * columns) - begin * piece);
    for (std::int64_t row = begin; row < end; ++row) body(row, 0, columns);
  };
  if (rows * columns * element_size(t.dtype) <= serial_bytes) return some(0, items);
  threads(items, some);
}

bool dense(const TensorView& t) {
  return t.stride[0] == t.size[1] || t.size[0] <= 1;
}
char* at(const TensorView& t, std::int64_t row, std::int64_t column) {
  return static_cast<char*>(t.data) + (row * t.stride[0] + column) * element_size(t.dtype);
}

}  // namespace

std::span<const Limits> limits(DType dtype) {
  using Boxes = std::span<const Limits>;
  if (dtype == DType::bfloat16) return isa() == Isa::amx ? few_for_tiles : few;
  if (!is_amd()) return dtype == DType::float16 ? few : few_beyond_the_cache;
  const bool wide = isa() >= Isa::v4;
  if (dtype == DType::float16) return wide ? Boxes(amd_float16) : Boxes(amd_float16_avx2);
  if (dtype == DType::float32) return wide ? Boxes(amd_float32) : Boxes(amd_float32_avx2);
  return wide ? Boxes(amd_float64) : Boxes(amd_float64_avx2);
}

void linear(const Linear& args, const Threads& threads) {
  const DType dtype = args.x.dtype;
  const std::int64_t rows = args.x.size[0], in = args.x.size[1], rank = args.down.size[0], out = args.up.size[0];
  if (rows * out == 0) return;
  const ProductKernels& kernels = product_kernels(dtype);
  const std::int64_t size = element_size(dtype);

  // hidden: kept by the caller, or ours, where the second operand is made of it.
  const bool own = args.hidden == nullptr && !kernels.operand_from_sums;
  const std::int64_t first = round_up(kernels.operand_bytes(rows, in)), second = round_up(kernels.operand_bytes(rows, rank));
  char* const memory = static_cast<char*>(scratch::get(scratch::Slot::shared, first + second + (own ? rows * rank * size : 0)));
  void* const hidden = own ? memory + first + second : args.hidden;

  kernels.prepare(memory, args.x.data, args.x.stride[0], rows, in);
  Product down;
  down.operand = memory;
  down.rows = rows;
  down.weights = static_cast<const char*>(args.down.data);
  down.weight_stride = args.down.stride[0] * size;
  down.columns = rank;
  down.k = in;
  down.out = hidden;
  down.out_stride = rank;
  if (kernels.operand_from_sums) {
    std::memset(memory + first, 0, second);  // what pads its rows
    down.sums = memory + first;
    down.sums_stride = kernels.operand_bytes(1, rank) / sum_size(dtype);
  }
  multiply(kernels, down, rank * in * size, threads);

  if (!kernels.operand_from_sums) kernels.prepare(memory + first, hidden, rank, rows, rank);
  Product up;
  up.operand = memory + first;
  up.rows = rows;
  up.weights = static_cast<const char*>(args.up.data);
  up.weight_stride = args.up.stride[0] * size;
  up.columns = out;
  up.k = rank;
  up.bias = args.bias != nullptr ? args.bias->data : nullptr;
  up.activation = args.activation;
  up.before = args.before;
  up.before_stride = out;
  up.out = args.out.data;
  up.out_stride = args.out.stride[0];
  multiply(kernels, up, out * rank * size, threads);
}

void activate(const Activate& args, const Threads& threads) {
  const ActivationKernels& kernels = activation_kernels(args.in.dtype);
  for_rows(args.in, dense(args.in) && dense(args.out), threads, [&](std::int64_t row, std::int64_t column, std::int64_t n) {
    kernels.activate(at(args.out, row, column), at(args.in, row, column), n, args.activation);
  });
}

void activate_backward(const ActivateBackward& args, const Threads& threads) {
  const ActivationKernels& kernels = activation_kernels(args.dout.dtype);
  const bool together = dense(args.dout) && dense(args.before) && dense(args.dz);
  for_rows(args.dout, together, threads, [&](std::int64_t row, std::int64_t column, std::int64_t n) {
    kernels.backward(at(args.dz, row, column), at(args.dout, row, column), at(args.before, row, column), n, args.activation);
  });
}

}  // namespace effcore::lowrank
