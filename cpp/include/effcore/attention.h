// Softmax attention, and its use by several layers.
//
//   P = softmax(scale * Q K^T + visibility),   lse = log sum exp of a row of scores,   O = P V
//
// Shapes: q [B, heads, queries, head_dim], k [B, kv_heads, keys, head_dim], v [B, kv_heads, keys, value_dim]; heads is a
// multiple of kv_heads, and query head h reads kv head h / (heads / kv_heads). Strides are arbitrary as long as the last
// dimension is contiguous. lse and delta are float32 (float64 for float64 tensors), contiguous, [B, heads, queries].
//
// A layer group shares one P: O_l = P V_l (docs/ops.md derives the gradients). The owner computes it; a consumer brings only V.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "effcore/tensor.h"
#include "effcore/threads.h"

namespace effcore::attention {

// Kept probabilities are stored as tile x tile blocks (row-major inside, 0 where invisible), tiles of one block of rows one
// after the other, blocks of rows after that. With `causal` the tiles that no row of the block can see are left out. Behind the
// tiles of all heads there is room for a float32 factor a row [B, heads, queries], by which CUDA kernels multiply what is
// stored.
constexpr std::int64_t probs_tile = 64;

// A decoding row's weights exp(score - chunk maximum) carry one float32 scale for each chunk of this many keys.
constexpr std::int64_t decode_chunk = 256;

// Everything that a kernel must know besides its tensors. Query i of row b sees the keys j with
//   first_key[b, i] <= j < (causal ? min(lengths[b], lengths[b] - queries + i + 1) : lengths[b]).
// lengths == nullptr means `keys` for each row, first_key == nullptr means 0. Values out of [0, keys] are clamped by CUDA
// kernels (they cannot raise) and refused on the CPU. A query that sees no key has lse = -inf, P = 0 and O = 0.
struct Problem {
  DType dtype = DType::other;
  DeviceKind device = DeviceKind::other;
  std::int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  double scale = 1.0;
  bool causal = false;
  const std::int32_t* lengths = nullptr;
  std::int64_t lengths_stride = 0;
  const std::int32_t* first_key = nullptr;
  std::int64_t first_key_stride[2] = {};  // batch, query (0 where one value serves a whole row)
};

struct Options {
  bool causal = false;
  std::optional<double> scale;  // default 1 / sqrt(head_dim)
  const TensorView* lengths = nullptr;
  const TensorView* first_key = nullptr;
};

// Checks every argument and throws std::invalid_argument with `function` in front. v may be null where there is none yet.
Problem check(const char* function, const TensorView& q, const TensorView& k, const TensorView* v, const Options& options);
// A further tensor of the same device and dtype that must have exactly these sizes ([B, heads, queries, value_dim] and so on).
void check_tensor(const char* function, const char* argument, const TensorView& tensor, const Problem& problem, DType dtype,
                  std::initializer_list<std::int64_t> sizes);

// Elements of one (batch, head)'s packed probabilities, with room for their factors (float32, one a row, behind the tiles of
// all heads: two elements a row). The whole tensor is [B, heads, this]. The CPU reads tiles alone, as it writes P itself; a
// GPU's may hold P up to these factors.
std::int64_t probs_elements(std::int64_t queries, std::int64_t keys, bool causal);

struct Forward {
  Problem problem;
  TensorView q, k, v;
  TensorView out;
  void* lse = nullptr;
  void* probs = nullptr;  // null: not kept
};

// A consumer's layer: P from the owner's lse (recomputing q k^T) or from its kept probabilities; only v is its own.
struct SharedForward {
  Problem problem;
  TensorView q, k, v;  // q and k are not read where probs are given
  const void* lse = nullptr;
  const void* probs = nullptr;
  TensorView out;
};

// dv = P^T dout (summed over the query heads of a kv head), delta = rowsum(dout * out)
struct SharedBackward {
  Problem problem;
  TensorView q, k;
  const void* lse = nullptr;
  const void* probs = nullptr;
  TensorView dout, out;
  TensorView dv;
  void* delta = nullptr;
};

// The group's owner. With dP = sum_l dout_l v_l^T and delta = rowsum(dout_0 * out) + consumers_delta:
//   dS = P * (dP - delta),  dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T dout_0.
// One layer (layers == 1, consumers_delta == nullptr) is the plain backward of attention.
struct Backward {
  Problem problem;
  TensorView q, k;
  const void* lse = nullptr;
  const void* probs = nullptr;
  TensorView out;  // of the owner
  int layers = 1;
  const TensorView* dout = nullptr;       // [layers], the owner's first
  const TensorView* v = nullptr;          // [layers]
  const void* consumers_delta = nullptr;  // [B, heads, queries], summed over the consumers
  TensorView dq, dk, dv;                  // dk and dv in the problem's dtype or in float32
  TensorView dk_sum, dv_sum;              // float32, added to dk and dv before they are rounded; none where data is null
};

// One new token a row against a padded cache: queries == 1, not causal. weights [B, heads, keys] in the tensors' dtype (0 at
// keys that are not seen) and scales [B, heads, ceil(keys / decode_chunk)] float32 (float64), with P = weights * scale of its
// chunk.
struct Decode {
  Problem problem;
  TensorView q, k, v, out;
  void* weights = nullptr;  // null: not returned
  void* scales = nullptr;
};
struct DecodeFromProbs {
  Problem problem;
  const void* weights = nullptr;
  const void* scales = nullptr;
  TensorView v, out;
};

void forward(const Forward& args, const Threads& threads);
void shared_forward(const SharedForward& args, const Threads& threads);
void shared_backward(const SharedBackward& args, const Threads& threads);
void backward(const Backward& args, const Threads& threads);
void decode(const Decode& args, const Threads& threads);
void decode_from_probs(const DecodeFromProbs& args, const Threads& threads);

}  // namespace effcore::attention
