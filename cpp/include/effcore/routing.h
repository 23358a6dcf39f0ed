// Token movement: which tokens stay, and the rows of x [B, tokens, channels] to and from lists of them.
//
// A list of tokens is int32 [B, size], any strides. A partition is two lists, both ascending, that name each token once.
// Tensors of rows have any strides as long as the last dimension is contiguous. Two calls give the same bits, whatever the
// number of threads.
#pragma once
#include <cstdint>

#include "effcore/tensor.h"
#include "effcore/threads.h"

namespace effcore::routing {

// kept: the `keep` tokens of each row with the greatest scores, ties to the lower index, NaN last; the first `protect` tokens
// always. rest: the others. Both ascending.
struct Partition {
  TensorView scores;  // [B, tokens]
  std::int64_t keep = 0, protect = 0;
  std::int32_t* kept = nullptr;  // [B, keep], contiguous
  std::int32_t* rest = nullptr;  // [B, tokens - keep], contiguous
};

// scores[b, n] = mean over heads of softmax_n(scale * q[b, h, 0] . k[b, g(h), n]), g(h) = h / (heads / kv_heads)
struct ClassScores {
  TensorView q;  // [B, heads, 1, D]
  TensorView k;  // [B, kv_heads, N, D]
  double scale = 1.0;
  void* scores = nullptr;  // [B, N] contiguous, float32 (float64 for float64 tensors)
};

// The partition of the class scores. partition.scores is a float32 (float64) [B, N] that may be used as scratch memory.
struct ScorePartition {
  ClassScores score;
  Partition partition;
};

struct List {
  TensorView rows;   // [B, size, channels]
  TensorView index;  // [B, size] int32
};

// rows[b, i] = x[b, index[b, i]], for one list or for two
struct Gather {
  TensorView x;
  int lists = 1;
  List list[2];
};

// The inverse of a partition: out[b, index[b, i]] = rows[b, i] for both lists, plus what is given of residual [B, tokens,
// channels] (in the order of out) and first_residual [B, size, channels] (in the order of the first list). Sums are rounded
// once.
struct Merge {
  List list[2];
  const TensorView* residual = nullptr;
  const TensorView* first_residual = nullptr;
  TensorView out;
};

// The gradient of a gather with one list: dx[b, n] = sum of rows[b, i] over index[b, i] == n. A repeated token gets the sum.
struct Scatter {
  List list;
  TensorView dx;
};

// A gather and the normalization of what was gathered: xhat = (x - mean) * rstd with the mean and the variance of a row (rms:
// mean = 0 and rstd = 1 / sqrt(mean(x^2) + eps)); normed = xhat * weight + bias. Statistics in float32 (float64).
struct GatherNorm {
  TensorView x;
  List tokens;
  TensorView normed;  // [B, size, channels]
  TensorView weight;  // [channels], in x's dtype or in float32
  const TensorView* bias = nullptr;
  double eps = 0.0;
  bool rms = false;
  void* mean = nullptr;  // [B, size] contiguous, float32 (float64); null with rms
  void* rstd = nullptr;
};

// With g = dnormed * weight:   dx[index] += dtokens + rstd * (g - mean(g) - xhat * mean(g * xhat))   (rms: without mean(g))
//                              dweight = sum of dnormed * xhat,   dbias = sum of dnormed
struct GatherNormBackward {
  List tokens;                          // rows: as gathered in the forward
  const TensorView* dtokens = nullptr;  // [B, size, channels]
  TensorView dnormed;
  TensorView weight;
  bool rms = false;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  TensorView dx;            // [B, tokens, channels]
  void* dweight = nullptr;  // [channels] float32 (float64)
  void* dbias = nullptr;    // or null
};

// Checks: all throw std::invalid_argument with `function` in front. On the CPU the values of indices too.
void check_partition(const char* function, const TensorView& scores, std::int64_t keep, std::int64_t protect);
void check_scores(const char* function, const TensorView& q, const TensorView& k, double scale);
// [B, tokens, channels] of a supported dtype with contiguous rows; `like`, where given, fixes dtype and device.
void check_rows(const char* function, const char* argument, const TensorView& rows, const TensorView* like);
// Tokens of a list of x [B, tokens, channels]: any order, repeats allowed.
void check_list(const char* function, const char* argument, const TensorView& index, const TensorView& like,
                std::int64_t tokens);
// Two lists that name each token once.
void check_lists(const char* function, const TensorView& index_a, const TensorView& index_b, const TensorView& like,
                 std::int64_t tokens);
void check_weight(const char* function, const char* argument, const TensorView& weight, const TensorView& like);

void partition(const Partition& args, const Threads& threads);
void class_scores(const ClassScores& args, const Threads& threads);
void score_partition(const ScorePartition& args, const Threads& threads);
void gather(const Gather& args, const Threads& threads);
void merge(const Merge& args, const Threads& threads);
void scatter(const Scatter& args, const Threads& threads);
void gather_norm(const GatherNorm& args, const Threads& threads);
void gather_norm_backward(const GatherNormBackward& args, const Threads& threads);

}  // namespace effcore::routing
