// The contract between the baseline unit (checks, plan, threads) and the kernels compiled once for each instruction set.
//
// Kernels are plain functions of a job and a task index: they own no thread, allocate nothing but scratch, and throw nothing.
// All functions of this header are static: an inline function with external linkage would be merged across instruction sets.
#pragma once
#include <cstdint>

#include "effcore/attention.h"

namespace effcore::attention {

// The first task of a job that needs K and V reads them once and writes them in the layout of the products ("packed"), for a
// wave of kv heads at a time; the second kind of task then works on blocks of query rows. See isa/forward.h and isa/backward.h.
struct Wave {
  std::int64_t first = 0, count = 0;  // kv heads, numbered batch * kv_heads + head
  char* packed = nullptr;
  std::int64_t packed_bytes = 0;  // of one kv head
  std::int64_t pack_segment = 0;  // keys of one packing task
};

enum class Source { scores, lse, probs };  // of P: its own softmax, a saved lse, or kept probabilities

struct ForwardJob {
  Problem problem;
  TensorView q, k, v, out;
  Source source = Source::scores;
  void* lse = nullptr;    // written for Source::scores, read for Source::lse
  void* probs = nullptr;  // written for Source::scores (or null), read for Source::probs
  Wave wave;
};

struct ForwardKernels {
  std::int64_t row_block;
  std::int64_t (*packed_bytes)(const ForwardJob&);
  void (*pack)(const ForwardJob&, std::int64_t task);
  void (*rows)(const ForwardJob&, std::int64_t task);
};

struct BackwardJob {
  Problem problem;
  TensorView q, k;
  Source source = Source::lse;
  const void* lse = nullptr;
  const void* probs = nullptr;
  TensorView out;
  int layers = 0;                    // 0: a consumer, which needs its own dv and delta alone
  const TensorView* dout = nullptr;  // [max(layers, 1)]
  const TensorView* v = nullptr;     // [layers]
  const void* consumers_delta = nullptr;
  void* delta = nullptr;
  TensorView dq, dk, dv, dk_sum, dv_sum;
  Wave wave;
  // A kv head's pairs (query head, block of rows) are dealt to `splits` tasks, each with its own sums of dk and dv.
  std::int64_t splits = 1;
  char* partial = nullptr;
  std::int64_t partial_bytes = 0;  // of one split
};

struct BackwardKernels {
  std::int64_t row_block;
  std::int64_t (*packed_bytes)(const BackwardJob&);
  std::int64_t (*partial_bytes)(const BackwardJob&);
  void (*pack)(const BackwardJob&, std::int64_t task);
  void (*rows)(const BackwardJob&, std::int64_t task);
  void (*reduce)(const BackwardJob&, std::int64_t task);
};

// A decoding row's chunks are dealt to `segments` tasks; a second pass adds up what they found.
struct DecodeJob {
  Problem problem;
  TensorView q, k, v, out;
  bool from_probs = false;
  void* weights = nullptr;
  void* scales = nullptr;
  std::int64_t segments = 1, segment_chunks = 1;
  // For each (row, head, chunk): the chunk's maximum and its sum; for each (row, head, segment): the unscaled output.
  char* maxima = nullptr;
  char* sums = nullptr;
  char* partial = nullptr;
};

struct DecodeKernels {
  void (*segment)(const DecodeJob&, std::int64_t task);
  void (*combine)(const DecodeJob&, std::int64_t task);
};

#define EFFCORE_DECLARE_KERNELS(ISA)              \
  namespace ISA {                                 \
  const ForwardKernels& forward_kernels(DType);   \
  const BackwardKernels& backward_kernels(DType); \
  const DecodeKernels& decode_kernels(DType);     \
  }
EFFCORE_DECLARE_KERNELS(v2)
EFFCORE_DECLARE_KERNELS(v3)
EFFCORE_DECLARE_KERNELS(v4)
// For bfloat16 alone.
EFFCORE_DECLARE_KERNELS(bf16)
EFFCORE_DECLARE_KERNELS(amx)
#undef EFFCORE_DECLARE_KERNELS

struct KeyRange {
  std::int64_t begin, end;
};

static inline std::int64_t row_length(const Problem& p, std::int64_t b) {
  return p.lengths != nullptr ? p.lengths[b * p.lengths_stride] : p.keys;
}

static inline std::int64_t first_visible(const Problem& p, std::int64_t b, std::int64_t i) {
  return p.first_key != nullptr ? p.first_key[b * p.first_key_stride[0] + i * p.first_key_stride[1]] : 0;
}
static inline std::int64_t end_visible(const Problem& p, std::int64_t b, std::int64_t i) {
  const std::int64_t length = row_length(p, b), end = p.causal ? length - p.queries + i + 1 : length;
  return end < length ? end : length;
}

// The keys that queries [i, j] of row b see together: a query's own range where i == j. Both ends never fall as i and j grow.
static inline KeyRange visible_keys(const Problem& p, std::int64_t b, std::int64_t i, std::int64_t j) {
  const std::int64_t begin = first_visible(p, b, i), end = end_visible(p, b, j);
  return {begin, end > begin ? end : begin};
}
static inline KeyRange visible_keys(const Problem& p, std::int64_t b, std::int64_t i) {
  return visible_keys(p, b, i, i);
}

// A row that sees no key is stored as zeros: its sums may hold NaN, the product of its P = 0 with a NaN that other rows see.
static inline bool sees_keys(const Problem& p, std::int64_t b, std::int64_t i) {
  return end_visible(p, b, i) > first_visible(p, b, i);
}

// Kept tiles of the block of rows [block * probs_tile, ...): the same for all rows of the batch, whatever their lengths.
static inline std::int64_t probs_tiles(const Problem& p, std::int64_t block) {
  std::int64_t end = p.keys;
  if (p.causal) {
    const std::int64_t last = (block + 1) * probs_tile < p.queries ? (block + 1) * probs_tile : p.queries;
    end = p.keys - p.queries + last;
    end = end < 0 ? 0 : end < p.keys ? end : p.keys;
  }
  return (end + probs_tile - 1) / probs_tile;
}

}  // namespace effcore::attention
