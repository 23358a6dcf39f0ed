// Gram matrices of ragged groups on the CPU: how the work is cut. The arithmetic is in isa/kronecker_gram.cpp.
//
// Tokens are packed once, a wave of segments at a time; then each task multiplies one block of one upper triangle and mirrors
// it, so that half of the products of a general matrix product are never done.
#include "effcore/kronecker.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "choose.h"
#include "kronecker_kernels.h"
#include "pages.h"
#include "scratch.h"
#include "tasks.h"

namespace effcore::kronecker {
namespace {

// A segment's operands stream from the last-level cache; sums over a segment are one chain of float32 additions, so a shorter
// one is also more accurate.
constexpr std::int64_t segment_tokens = 4096;
constexpr std::int64_t wave_bytes = std::int64_t{16} << 20;
// Results beyond this are written past the caches.
constexpr std::int64_t cached_bytes = std::int64_t{16} << 20;

const GramKernels& gram_kernels(DType dtype){EFFCORE_RETURN_PRODUCTS(gram_kernels, dtype)}

// Of one expert's result.
std::int64_t matrix_bytes(const TensorView& x) {
  return x.size[1] * x.size[1] * (x.dtype == DType::float64 ? 8 : 4);
}

std::vector<Segment> segments_of(const GroupedGram& args) {
  const auto* offsets = static_cast<const std::int32_t*>(args.offsets.data);
  const std::int64_t experts = args.offsets.size[0] - 1, matrix = matrix_bytes(args.x);
  std::vector<Segment> segments;
  for (std::int64_t e = 0; e < experts; ++e) {
    std::int64_t begin = offsets[e];
    do {  // an expert without tokens has one empty segment: its matrix is written as well
      const std::int64_t end = std::min<std::int64_t>(begin + segment_tokens, offsets[e + 1]);
      const bool first = begin == offsets[e];
      const void* from = first ? args.previous : args.result;
      const double beta = first ? args.beta : 1.0;
      segments.push_back({e, begin, end, beta == 0.0 ? nullptr : static_cast<const char*>(from) + e * matrix, beta});
      begin = end;
    } while (begin < offsets[e + 1]);
  }
  return segments;
}

void run_wave(const GramJob& job, const GramKernels& kernels, const Segment* segments, std::int64_t count,
              const Threads& threads) {
  struct Task {
    const Segment* segment;
    std::int64_t row, column;
  };
  const std::int64_t dim = job.x.size[1], matrix = matrix_bytes(job.x);
  std::vector<const Segment*> fresh;
  std::vector<Task> packs, blocks;
  for (const Segment* s = segments; s < segments + count; ++s) {
    if (s->previous == nullptr) fresh.push_back(s);
    for (std::int64_t first = 0; first < s->end - s->begin; first += gram_pack) packs.push_back({s, first, 0});
    for (std::int64_t row = 0; row < dim; row += gram_block)
      for (std::int64_t column = row + gram_block; column < dim; column += gram_block) blocks.push_back({s, row, column});
  }
  // Blocks on the diagonal take half as long: they come last, so that threads end together.
  for (const Segment* s = segments; s < segments + count; ++s)
    for (std::int64_t row = 0; row < dim; row += gram_block) blocks.push_back({s, row, row});
  const auto pages = static_cast<std::int64_t>(fresh.size());
  run_tasks(threads, pages + static_cast<std::int64_t>(packs.size()), [&](std::int64_t task) {
    if (task < pages)
      return touch_large_pages(static_cast<char*>(job.result) + fresh[task]->expert * matrix, static_cast<std::size_t>(matrix));
    const Task& pack = packs[task - pages];
    kernels.pack(job, *pack.segment, pack.row);
  });
  run_tasks(threads, static_cast<std::int64_t>(blocks.size()),
            [&](std::int64_t task) { kernels.block(job, *blocks[task].segment, blocks[task].row, blocks[task].column); });
}

}  // namespace

void grouped_gram(const GroupedGram& args, const Threads& threads) {
  const std::int64_t dim = args.x.size[1];
  if (dim == 0) return;
  const std::int64_t bytes_written = (args.offsets.size[0] - 1) * matrix_bytes(args.x);
  const GramJob job{args.x, args.alpha, args.result, bytes_written > cached_bytes};
  const GramKernels& kernels = gram_kernels(args.x.dtype);
  std::vector<Segment> segments = segments_of(args);
  if (args.previous == nullptr) prefer_large_pages(args.result, static_cast<std::size_t>(bytes_written));
  // Consecutive segments of different experts that fit; a second segment of an expert reads what the first has written.
  for (std::size_t first = 0; first < segments.size();) {
    std::size_t last = first;
    std::int64_t bytes = 0;
    for (; last < segments.size(); ++last) {
      const Segment& s = segments[last];
      const std::int64_t more = kernels.packed_bytes(s.end - s.begin, dim);
      if (last > first && (bytes + more > wave_bytes || s.expert == segments[last - 1].expert)) break;
      bytes += more;
    }
    char* packed = static_cast<char*>(scratch::get(scratch::Slot::shared, bytes));
    for (std::size_t i = first; i < last; ++i) {
      segments[i].packed = packed;
      packed += kernels.packed_bytes(segments[i].end - segments[i].begin, dim);
    }
    run_wave(job, kernels, segments.data() + first, static_cast<std::int64_t>(last - first), threads);
    first = last;
  }
}

}  // namespace effcore::kronecker
