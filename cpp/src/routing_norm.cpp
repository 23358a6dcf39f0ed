// A gather and the normalization of what was gathered, on the CPU: each row is read once and written twice.
#include <algorithm>
#include <cstring>

#include "routing_kernels.h"
#include "routing_rows.h"
#include "scratch.h"

namespace effcore::routing {
namespace {

// The backward's sums over rows are taken in this many pieces, whatever the number of threads: the same bits on each machine of
// one instruction set.
constexpr std::int64_t pieces = 32;

// The next row's, while this one is computed: a core looks ahead less far than a row's arithmetic is long.
void prefetch(const void* row, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

void load_weight(void* to, const TensorView& weight) {
  row_kernels(weight.dtype).load(to, weight.data, weight.size[0]);
}

}  // namespace

void gather_norm(const GatherNorm& args, const Threads& threads) {
  const std::int64_t batch = args.x.size[0], size = args.normed.size[1], channels = args.x.size[2];
  if (batch * size * channels == 0) return;
  const std::int64_t sum = sum_size(args.x.dtype), row_bytes = round_up(channels * sum);
  auto* const parameters = static_cast<char*>(scratch::get(scratch::Slot::shared, 2 * row_bytes));
  load_weight(parameters, args.weight);
  if (args.bias != nullptr) load_weight(parameters + row_bytes, *args.bias);
  const Rows x(args.x), tokens(args.tokens.rows), normed(args.normed);
  const Lists index(args.tokens.index);
  const RowKernels& kernels = row_kernels(args.x.dtype);
  threads(batch * size, [&](std::int64_t begin, std::int64_t end) {
    void* const row = scratch::get(scratch::Slot::local, row_bytes);
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t b = r / size, i = r % size;
      const void* from = x(b, index(b, i));
      if (r + 1 < end) prefetch(x((r + 1) / size, index((r + 1) / size, (r + 1) % size)), x.bytes);
      kernels.load(row, from, channels);
      std::memcpy(tokens(b, i), from, x.bytes);
      kernels.norm(normed(b, i), row, parameters, args.bias != nullptr ? parameters + row_bytes : nullptr, channels, args.eps,
                   args.rms, args.mean != nullptr ? static_cast<char*>(args.mean) + r * sum : nullptr,
                   static_cast<char*>(args.rstd) + r * sum);
    }
  });
}

void gather_norm_backward(const GatherNormBackward& args, const Threads& threads) {
  const std::int64_t batch = args.dx.size[0], total = args.dx.size[1], size = args.tokens.rows.size[1],
                     channels = args.dx.size[2];
  const std::int64_t sum = sum_size(args.dx.dtype), row_bytes = round_up(channels * sum), rows = batch * total;
  if (args.dweight != nullptr && channels > 0) std::memset(args.dweight, 0, channels * sum);
  if (args.dbias != nullptr && channels > 0) std::memset(args.dbias, 0, channels * sum);
  if (rows * channels == 0) return;
  const Inverse inverse(args.tokens.index, total, threads, (1 + 2 * pieces) * row_bytes);
  char* const weight = static_cast<char*>(inverse.extra());
  char* const sums = weight + row_bytes;  // [pieces][dweight, dbias]
  load_weight(weight, args.weight);
  std::memset(sums, 0, 2 * pieces * row_bytes);
  const Rows dx(args.dx), tokens(args.tokens.rows), dnormed(args.dnormed);
  const Rows dtokens(args.dtokens != nullptr ? *args.dtokens : args.dnormed);
  const RowKernels& kernels = row_kernels(args.dx.dtype);
  threads(pieces, [&](std::int64_t begin, std::int64_t end) {
    auto* const memory = static_cast<char*>(scratch::get(scratch::Slot::local, 3 * row_bytes));
    for (std::int64_t piece = begin; piece < end; ++piece) {
      char* const dweight = sums + 2 * piece * row_bytes;
      char* const dbias = args.dbias != nullptr ? dweight + row_bytes : nullptr;
      for (std::int64_t r = piece * rows / pieces; r < (piece + 1) * rows / pieces; ++r) {
        const std::int64_t b = r / total, n = r % total;
        std::int32_t i = inverse.first(b, n);
        if (i < 0) {
          std::memset(dx(b, n), 0, dx.bytes);
          continue;
        }
        std::memset(memory, 0, row_bytes);
        for (; i >= 0; i = inverse.next(b, i)) {
          const std::int64_t place = (b * size + i) * sum;
          if (args.dtokens != nullptr) kernels.add(memory, dtokens(b, i), channels);
          kernels.norm_backward(memory, tokens(b, i), dnormed(b, i), weight, channels, args.rms,
                                args.mean != nullptr ? static_cast<const char*>(args.mean) + place : nullptr,
                                static_cast<const char*>(args.rstd) + place, dweight, dbias, memory + row_bytes,
                                memory + 2 * row_bytes);
        }
        kernels.store(dx(b, n), memory, channels);
      }
    }
  });
  // The sums are of float (double), so its own kernels add them.
  const RowKernels& add = row_kernels(sum == 8 ? DType::float64 : DType::float32);
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    if (args.dweight != nullptr) add.add(args.dweight, sums + 2 * piece * row_bytes, channels);
    if (args.dbias != nullptr) add.add(args.dbias, sums + (2 * piece + 1) * row_bytes, channels);
  }
}

}  // namespace effcore::routing
