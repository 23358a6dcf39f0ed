// Which tokens stay, on the CPU: the class token's scores, and an exact selection in linear time (isa/routing_select.h).
#include <cstring>

#include "routing_kernels.h"
#include "routing_rows.h"
#include "scratch.h"

namespace effcore::routing {
namespace {

struct Scratch {
  std::int64_t probs, scores, q, keys, total;
  Scratch(std::int64_t tokens, std::int64_t dim, DType dtype) {
    const std::int64_t size = sum_size(dtype);
    probs = 0;
    scores = probs + round_up(tokens * size);
    q = scores + round_up(tokens * size);
    keys = q + round_up(dim * size);
    total = keys + round_up(tokens * size);
  }
};

// The partition of a row's scores, given as T.
void select_row(const Partition& args, std::int64_t b, const void* scores, void* keys) {
  const std::int64_t tokens = args.scores.size[1];
  row_kernels(args.scores.dtype)
      .select(scores, tokens, args.keep, args.protect, keys, args.kept + b * args.keep, args.rest + b * (tokens - args.keep));
}

void score_row(const ClassScores& args, std::int64_t b, char* memory, const Scratch& at, void* probs) {
  const RowKernels& kernels = row_kernels(args.q.dtype);
  const std::int64_t heads = args.q.size[1], group = heads / args.k.size[1], tokens = args.k.size[2], dim = args.k.size[3];
  const std::int64_t size = element_size(args.q.dtype);
  std::memset(probs, 0, tokens * sum_size(args.q.dtype));
  for (std::int64_t h = 0; h < heads; ++h) {
    const char* q = static_cast<const char*>(args.q.data) + (b * args.q.stride[0] + h * args.q.stride[1]) * size;
    const char* k = static_cast<const char*>(args.k.data) + (b * args.k.stride[0] + h / group * args.k.stride[1]) * size;
    kernels.load(memory + at.q, q, dim);
    kernels.score(probs, memory + at.scores, memory + at.q, k, args.k.stride[2], tokens, dim, args.scale,
                  1.0 / static_cast<double>(heads));
  }
}

}  // namespace

void partition(const Partition& args, const Threads& threads) {
  const std::int64_t tokens = args.scores.size[1];
  if (tokens == 0) return;
  const Scratch at(tokens, 0, args.scores.dtype);
  threads(args.scores.size[0], [&](std::int64_t begin, std::int64_t end) {
    auto* const memory = static_cast<char*>(scratch::get(scratch::Slot::local, at.total));
    for (std::int64_t b = begin; b < end; ++b) {
      const char* row =
          static_cast<const char*>(args.scores.data) + b * args.scores.stride[0] * element_size(args.scores.dtype);
      row_kernels(args.scores.dtype).load(memory + at.scores, row, tokens);
      select_row(args, b, memory + at.scores, memory + at.keys);
    }
  });
}

void class_scores(const ClassScores& args, const Threads& threads) {
  const std::int64_t tokens = args.k.size[2];
  if (tokens == 0) return;
  const Scratch at(tokens, args.k.size[3], args.q.dtype);
  threads(args.k.size[0], [&](std::int64_t begin, std::int64_t end) {
    auto* const memory = static_cast<char*>(scratch::get(scratch::Slot::local, at.total));
    for (std::int64_t b = begin; b < end; ++b)
      score_row(args, b, memory, at, static_cast<char*>(args.scores) + b * tokens * sum_size(args.q.dtype));
  });
}

void score_partition(const ScorePartition& args, const Threads& threads) {
  const ClassScores& score = args.score;
  const std::int64_t tokens = score.k.size[2];
  if (tokens == 0) return;
  const Scratch at(tokens, score.k.size[3], score.q.dtype);
  threads(score.k.size[0], [&](std::int64_t begin, std::int64_t end) {
    auto* const memory = static_cast<char*>(scratch::get(scratch::Slot::local, at.total));
    for (std::int64_t b = begin; b < end; ++b) {
      score_row(score, b, memory, at, memory + at.probs);
      select_row(args.partition, b, memory + at.probs, memory + at.keys);
    }
  });
}

}  // namespace effcore::routing
