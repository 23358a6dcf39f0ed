// Attention on the CPU: which arguments are taken, and how the work is cut into tasks. The arithmetic is in isa/.
#include "effcore/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_kernels.h"
#include "choose.h"
#include "effcore/error.h"
#include "scratch.h"
#include "tasks.h"

namespace effcore::attention {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

const ForwardKernels& forward_kernels(DType dtype) {
  EFFCORE_RETURN_PRODUCTS(forward_kernels, dtype)
}
const BackwardKernels& backward_kernels(DType dtype) {
  EFFCORE_RETURN_PRODUCTS(backward_kernels, dtype)
}
const DecodeKernels& decode_kernels(DType dtype) {
  EFFCORE_RETURN_PRODUCTS(decode_kernels, dtype)
}

// Packed heads and partial sums of one wave stay below this, as long as one kv head does.
constexpr std::int64_t wave_bytes = std::int64_t{128} << 20;
constexpr std::int64_t pack_segment = 256;
// A backward with fewer kv heads than this splits each over several tasks. A constant of the shapes, not of the number of
// threads: the order of summation, and so the result, is the same on any machine of one instruction set.
constexpr std::int64_t backward_tasks = 32;

std::int64_t accumulator_size(DType dtype) {
  return dtype == DType::float64 ? 8 : 4;
}

void run_forward(ForwardJob& job, const Threads& threads) {
  const Problem& p = job.problem;
  if (p.batch * p.queries * p.heads == 0) return;
  const ForwardKernels& kernels = forward_kernels(p.dtype);
  const std::int64_t heads = p.batch * p.kv_heads;
  const std::int64_t tasks_per_head = p.heads / p.kv_heads * ceil_div(p.queries, kernels.row_block);
  Wave& wave = job.wave;
  wave.packed_bytes = kernels.packed_bytes(job);
  wave.pack_segment = pack_segment;
  const std::int64_t wave_heads = std::clamp<std::int64_t>(wave_bytes / std::max<std::int64_t>(wave.packed_bytes, 1), 1, heads);
  wave.packed = static_cast<char*>(scratch::get(scratch::Slot::shared, wave_heads * wave.packed_bytes));
  for (wave.first = 0; wave.first < heads; wave.first += wave_heads) {
    wave.count = std::min(wave_heads, heads - wave.first);
    run_tasks(threads, wave.count * ceil_div(p.keys, pack_segment), [&](std::int64_t task) { kernels.pack(job, task); });
    run_tasks(threads, wave.count * tasks_per_head, [&](std::int64_t task) { kernels.rows(job, task); });
  }
}

void run_backward(BackwardJob& job, const Threads& threads) {
  const Problem& p = job.problem;
  if (p.batch * p.kv_heads == 0) return;
  const BackwardKernels& kernels = backward_kernels(p.dtype);
  const std::int64_t heads = p.batch * p.kv_heads;
  const std::int64_t blocks_per_head = p.heads / p.kv_heads * ceil_div(p.queries, kernels.row_block);
  Wave& wave = job.wave;
  wave.pack_segment = pack_segment;
  wave.packed_bytes = kernels.packed_bytes(job);
  job.partial_bytes = kernels.partial_bytes(job);
  job.splits = std::max<std::int64_t>(1, std::min({ceil_div(backward_tasks, heads), blocks_per_head,
                                                   2 * wave_bytes / std::max<std::int64_t>(job.partial_bytes, 1)}));
  const std::int64_t head_bytes = wave.packed_bytes + job.splits * job.partial_bytes;
  const std::int64_t wave_heads = std::clamp<std::int64_t>(wave_bytes / std::max<std::int64_t>(head_bytes, 1), 1, heads);
  wave.packed = static_cast<char*>(scratch::get(scratch::Slot::shared, wave_heads * head_bytes));
  job.partial = wave.packed + wave_heads * wave.packed_bytes;
  for (wave.first = 0; wave.first < heads; wave.first += wave_heads) {
    wave.count = std::min(wave_heads, heads - wave.first);
    const std::int64_t segments = wave.count * ceil_div(p.keys, pack_segment);
    run_tasks(threads, segments, [&](std::int64_t task) { kernels.pack(job, task); });
    run_tasks(threads, wave.count * job.splits, [&](std::int64_t task) { kernels.rows(job, task); });
    run_tasks(threads, segments, [&](std::int64_t task) { kernels.reduce(job, task); });
  }
}

void run_decode(DecodeJob& job, const Threads& threads) {
  const Problem& p = job.problem;
  if (p.batch * p.heads == 0) return;
  const DecodeKernels& kernels = decode_kernels(p.dtype);
  const std::int64_t heads = p.batch * p.kv_heads, chunks = ceil_div(p.keys, decode_chunk);
  // Enough tasks for any number of threads; of the shapes alone, so that results do not depend on it.
  constexpr std::int64_t tasks = 64, least_chunks = 2;
  job.segments = std::clamp<std::int64_t>(ceil_div(tasks, heads), 1, std::max<std::int64_t>(1, chunks / least_chunks));
  job.segment_chunks = std::max<std::int64_t>(1, ceil_div(chunks, job.segments));
  job.segments = std::max<std::int64_t>(1, ceil_div(chunks, job.segment_chunks));
  const std::int64_t size = accumulator_size(p.dtype), rows = p.batch * p.heads;
  const std::int64_t statistics = rows * std::max<std::int64_t>(chunks, 1) * size;
  char* memory =
      static_cast<char*>(scratch::get(scratch::Slot::shared, 2 * statistics + rows * job.segments * p.value_dim * size));
  job.maxima = memory;
  job.sums = memory + statistics;
  job.partial = memory + 2 * statistics;
  run_tasks(threads, heads * job.segments, [&](std::int64_t task) { kernels.segment(job, task); });
  run_tasks(threads, heads, [&](std::int64_t task) { kernels.combine(job, task); });
}

// The CPU's tiles hold P itself: factors of one, and zeros in what is left of their room.
void set_factors(const Problem& p, void* probs) {
  const std::int64_t heads = p.batch * p.heads, size = p.dtype == DType::float64 ? 8 : p.dtype == DType::float32 ? 4 : 2;
  const std::int64_t all = probs_elements(p.queries, p.keys, p.causal), room = 2 * p.queries;
  char* const behind = static_cast<char*>(probs) + heads * (all - room) * size;
  std::memset(behind, 0, static_cast<std::size_t>(heads * room * size));
  std::fill_n(reinterpret_cast<float*>(behind), heads * p.queries, 1.0f);
}

}  // namespace

std::int64_t probs_elements(std::int64_t queries, std::int64_t keys, bool causal) {
  Problem p;
  p.queries = queries;
  p.keys = keys;
  p.causal = causal;
  std::int64_t tiles = 0;
  for (std::int64_t block = 0; block < ceil_div(queries, probs_tile); ++block) tiles += probs_tiles(p, block);
  return tiles * probs_tile * probs_tile + 2 * queries;
}

void forward(const Forward& args, const Threads& threads) {
  if (args.probs != nullptr) set_factors(args.problem, args.probs);
  ForwardJob job{.problem = args.problem,
                 .q = args.q,
                 .k = args.k,
                 .v = args.v,
                 .out = args.out,
                 .source = Source::scores,
                 .lse = args.lse,
                 .probs = args.probs};
  run_forward(job, threads);
}

void shared_forward(const SharedForward& args, const Threads& threads) {
  ForwardJob job{.problem = args.problem,
                 .q = args.q,
                 .k = args.k,
                 .v = args.v,
                 .out = args.out,
                 .source = args.probs != nullptr ? Source::probs : Source::lse,
                 .lse = const_cast<void*>(args.lse),
                 .probs = const_cast<void*>(args.probs)};
  run_forward(job, threads);
}

void shared_backward(const SharedBackward& args, const Threads& threads) {
  BackwardJob job{.problem = args.problem,
                  .q = args.q,
                  .k = args.k,
                  .source = args.probs != nullptr ? Source::probs : Source::lse,
                  .lse = args.lse,
                  .probs = args.probs,
                  .out = args.out,
                  .dout = &args.dout,
                  .delta = args.delta,
                  .dv = args.dv};
  run_backward(job, threads);
}

void backward(const Backward& args, const Threads& threads) {
  BackwardJob job{.problem = args.problem,
                  .q = args.q,
                  .k = args.k,
                  .source = args.probs != nullptr ? Source::probs : Source::lse,
                  .lse = args.lse,
                  .probs = args.probs,
                  .out = args.out,
                  .layers = args.layers,
                  .dout = args.dout,
                  .v = args.v,
                  .consumers_delta = args.consumers_delta,
                  .dq = args.dq,
                  .dk = args.dk,
                  .dv = args.dv,
                  .dk_sum = args.dk_sum,
                  .dv_sum = args.dv_sum};
  run_backward(job, threads);
}

void decode(const Decode& args, const Threads& threads) {
  DecodeJob job{.problem = args.problem,
                .q = args.q,
                .k = args.k,
                .v = args.v,
                .out = args.out,
                .weights = args.weights,
                .scales = args.scales};
  run_decode(job, threads);
}

void decode_from_probs(const DecodeFromProbs& args, const Threads& threads) {
  DecodeJob job{.problem = args.problem,
                .v = args.v,
                .out = args.out,
                .from_probs = true,
                .weights = const_cast<void*>(args.weights),
                .scales = const_cast<void*>(args.scales)};
  run_decode(job, threads);
}

}  // namespace effcore::attention
