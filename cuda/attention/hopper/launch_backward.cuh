// Launchers of the backward kernels of sm_90a.
#pragma once
#include <algorithm>

#include "attention/hopper/backward.cuh"
#include "attention/hopper/backward.h"
#include "attention/hopper/backward_probs.cuh"
#include "attention/hopper/backward_scores.cuh"
#include "attention/hopper/backward_values.cuh"
#include "attention/hopper/launch.h"
#include "attention/hopper/tensor_map.h"
#include "attention/schedule.h"
#include "common/error.h"

namespace effcore::cuda::hopper {

// Descriptors of one launch's tensors. serves_backward has said that they exist.
template <class T>
class Maps {
 public:
  Maps(const Shape& shape, const char* function) : shape_(shape), function_(function) {}
  CUtensorMap of_queries(const Tensor4& t, int rows) const {
    return make(t, dtype, shape_.batch, shape_.heads, shape_.queries, rows);
  }
  CUtensorMap of_keys(const Tensor4& t, int rows, bool in_float = false) const {
    return make(t, in_float ? DType::float32 : dtype, shape_.batch, shape_.kv_heads, shape_.keys, rows);
  }
  CUtensorMap of_probs(const void* probs) const {
    const std::int64_t tiles = attention::probs_elements_of(shape_) / (attention::probs_tile * attention::probs_tile);
    CUtensorMap map;
    check(make_probs_map(&map, probs, dtype, tiles * shape_.batch * shape_.heads));
    return map;
  }

 private:
  static constexpr DType dtype = std::is_same_v<T, bf16> ? DType::bfloat16 : DType::float16;

  CUtensorMap make(const Tensor4& t, DType of, int batch, int heads, int tokens, int rows) const {
    CUtensorMap map;
    check(make_tensor_map(&map, t, of, batch, heads, tokens, rows));
    return map;
  }
  void check(bool made) const {
    if (!made) throw std::runtime_error(std::string("effcore.") + function_ + ": the CUDA driver refused a tensor map");
  }

  const Shape& shape_;
  const char* function_;
};

// Heads that run together, so that about `together` blocks of keys of each are under way, one step apart: they find Q, dout and
// dq's sums in L2, while the more of a head start at once, the longer they wait for their first turns (H200, one layer at
// length 4096, as long as the GPU's power allows: D = 64 1.72 ms with 4, 1.70 with 8, 1.80 with 16; D = 128 1.49 with 8, 1.47
// with 16, 1.54 with 32).
inline Schedule heads_together(int heads, int blocks, int together, const char* function) {
  const int wanted = std::max(1, device_attribute(cudaDevAttrMultiProcessorCount, function) / together);
  const int sections = std::max(1, (heads + wanted / 2) / wanted);
  return {blocks, heads, std::max(1, (heads + sections - 1) / sections)};
}

template <class T, int D, Values values>
void launch_owner(const BackwardParams& p, const char* function, cudaStream_t stream) {
  using Tiles = OwnerTiles<D, values>;
  const Shape& s = p.shape;
  OwnerParams params;
  params.shape = s;
  // One layer: so many that a head's blocks start about two steps apart, and each finds its turns passed on.
  const int query_blocks = attention::ceil_div(s.queries, Tiles::queries);
  const int together = values != Values::one ? 12 : std::clamp(query_blocks / 4, 4, D == 128 ? 16 : 8);
  params.schedule = heads_together(s.batch * s.kv_heads, attention::ceil_div(s.keys, Tiles::keys), together, function);
  params.lse = p.lse, params.delta = p.delta, params.factors = p.factors;
  params.layers = p.layers, params.dout_stages = Tiles::dout_stages(p.layers);
  params.dq_at = Tiles::staged(p.layers) ? Tiles::dq_at(p.layers) : 0;
  params.dq = p.dq, params.dk = p.dk, params.dv = p.dv;
  params.float_dk = p.float_dk, params.float_dv = p.float_dv;
  params.dk_sum = p.dk_sum, params.dv_sum = p.dv_sum;
  params.dq_sums = p.dq_sums;
  params.turns = p.turns, params.ticket = p.ticket;
  const Maps<T> maps(s, function);
  params.q = maps.of_queries(p.q, Tiles::queries);
  params.k = maps.of_keys(p.k, Tiles::keys);
  if constexpr (values == Values::kept) params.probs = maps.of_probs(p.probs);
  if (Tiles::hastens_end || p.float_dk) params.dk_map = maps.of_keys(p.dk, 16, p.float_dk);
  if (Tiles::hastens_end || p.float_dv) params.dv_map = maps.of_keys(p.dv, 16, p.float_dv);
  if (p.dk_sum.data != nullptr) params.dk_sum_map = maps.of_keys(p.dk_sum, Tiles::keys, true);
  if (p.dv_sum.data != nullptr) params.dv_sum_map = maps.of_keys(p.dv_sum, Tiles::keys, true);
  for (int l = 0; l < p.layers; ++l) {
    params.dout[l] = maps.of_queries(p.dout[l], Tiles::queries);
    params.v[l] = maps.of_keys(p.v[l], Tiles::keys);
  }
  launch(function, owner_kernel<T, D, values>, attention::blocks_of(params.schedule), backward_threads,
         Tiles::shared_bytes(p.layers), stream, params);
}

// dv = P^T dout of one layer, P from lse.
template <class T, int D>
void launch_values(const BackwardParams& p, const char* function, cudaStream_t stream) {
  using Tiles = ValuesTiles<D>;
  const Shape& s = p.shape;
  ValuesParams params;
  params.shape = s;
  params.schedule = heads_together(s.batch * s.kv_heads, attention::ceil_div(s.keys, Tiles::keys), 12, function);
  params.lse = p.lse;
  params.dv = p.dv;
  params.float_dv = p.float_dv;
  const Maps<T> maps(s, function);
  params.q = maps.of_queries(p.q, Tiles::queries);
  params.k = maps.of_keys(p.k, Tiles::keys);
  params.dout = maps.of_queries(p.dout[0], Tiles::queries);
  launch(function, values_kernel<T, D>, attention::blocks_of(params.schedule), backward_threads, Tiles::shared_bytes, stream,
         params);
}

// dv = factor P^T dout from a kept matrix.
struct ProbsOperands {
  const void* probs;
  const Tensor4 &dout, &dv;
  bool float_dv;
  float factor;
};

template <class T, int D>
void launch_values_from_probs(const BackwardParams& p, const ProbsOperands& operands, const char* function,
                              cudaStream_t stream) {
  using Tiles = ProbsValuesTiles<D>;
  const Shape& s = p.shape;
  ProbsValuesParams params;
  params.shape = s;
  // H200, 4096 and 8192 keys: at D = 128 4 blocks of a head together take 4 and 1-2 % less than 12, 64 take 4 and 13 % more; at
  // D = 64 4 take 2 % less and 3 % more.
  params.schedule = heads_together(s.batch * s.kv_heads, attention::ceil_div(s.keys, Tiles::keys), D == 128 ? 4 : 12, function);
  params.dv = operands.dv;
  params.float_dv = operands.float_dv;
  params.factor = operands.factor;
  params.ticket = p.ticket;
  const Maps<T> maps(s, function);
  params.probs = maps.of_probs(operands.probs);
  params.dout = maps.of_queries(operands.dout, Tiles::queries);
  const unsigned blocks = staying_blocks(attention::blocks_of(params.schedule), params.ticket, function, stream);
  launch(function, values_from_probs_kernel<T, D>, blocks, backward_threads, Tiles::shared_bytes, stream, params);
}

// The owner's backward in four kernels (backward_scores.cuh).
template <class T, int D, bool from_probs>
void launch_scores(const BackwardParams& p, const void* probs, void* ds, const char* function, cudaStream_t stream) {
  using Tiles = ScoresTiles;
  const Shape& s = p.shape;
  ScoresParams params;
  params.shape = s;
  params.lse = p.lse, params.delta = p.delta, params.factors = p.factors;
  params.layers = p.layers, params.panels = D / panel_columns;
  const Maps<T> maps(s, function);
  params.probs = maps.of_probs(probs), params.ds = maps.of_probs(ds);
  if constexpr (!from_probs) {
    params.q = maps.of_queries(p.q, Tiles::queries);
    params.k = maps.of_keys(p.k, Tiles::keys / Tiles::cluster);
  }
  for (int l = 0; l < p.layers; ++l) {
    params.dout[l] = maps.of_queries(p.dout[l], Tiles::queries);
    params.v[l] = maps.of_keys(p.v[l], Tiles::keys / Tiles::cluster);
  }
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount, function) / Tiles::cluster * Tiles::cluster;
  launch(function, scores_kernel<T, from_probs>, static_cast<unsigned>(blocks), backward_threads, Tiles::shared_bytes, stream,
         params);

  const float scale = s.negative ? -s.scale : s.scale;
  launch_values_from_probs<T, D>(p, {probs, from_probs ? p.scaled_dout : p.dout[0], p.dv, p.float_dv, 1.0f}, function, stream);
  launch_values_from_probs<T, D>(p, {ds, p.q, p.dk, p.float_dk, scale}, function, stream);
  const attention::ForwardParams forward{s, {}, {}, {}, p.k, p.dq, nullptr, ds, nullptr, p.ticket};
  if (!attention::hopper::Kernels<T, D>::forward_probs(forward, scale, function, stream))
    throw std::runtime_error(std::string("effcore.") + function + ": the CUDA driver refused a tensor map");
}

// How many heads' dS, and P where it is not kept, stand in device memory at a time: all of them, or, where P was not to take
// that memory in the first place, as many of a row of the batch as fit into 1 GiB, if any do.
inline int scores_heads(std::int64_t batch, std::int64_t heads, std::int64_t group, std::int64_t bytes_per_head,
                        bool from_probs) {
  constexpr std::int64_t room = std::int64_t{1} << 30;
  if (from_probs || batch * heads * bytes_per_head <= room) return static_cast<int>(batch * heads);
  return static_cast<int>(std::min(room / bytes_per_head / group * group, heads));
}

// The problem of `heads` heads from `head` on of row `row` of the batch.
template <class T>
BackwardParams part_of(const BackwardParams& p, int row, int head, int heads) {
  const Shape& s = p.shape;
  BackwardParams part = p;
  part.shape.batch = 1, part.shape.heads = heads, part.shape.kv_heads = heads / s.group;
  if (s.lengths != nullptr) part.shape.lengths += row * s.lengths_stride;
  if (s.first_key != nullptr) part.shape.first_key += row * s.first_key_batch;
  const auto advance = [&](Tensor4& t, int from, std::size_t size) {
    t.data = static_cast<char*>(t.data) + (row * t.stride[0] + from * t.stride[1]) * static_cast<std::int64_t>(size);
  };
  for (Tensor4* t : {&part.q, &part.dq}) advance(*t, head, sizeof(T));
  for (int l = 0; l < p.layers; ++l) advance(part.dout[l], head, sizeof(T)), advance(part.v[l], head / s.group, sizeof(T));
  advance(part.k, head / s.group, sizeof(T));
  advance(part.dk, head / s.group, p.float_dk ? sizeof(float) : sizeof(T));
  advance(part.dv, head / s.group, p.float_dv ? sizeof(float) : sizeof(T));
  const std::int64_t before = (static_cast<std::int64_t>(row) * s.heads + head) * s.queries;
  part.lse += before, part.delta += before;
  return part;
}

}  // namespace effcore::cuda::hopper

namespace effcore::cuda::attention::hopper {

namespace tiled = effcore::cuda::hopper;

// Of a head's dS, and of its P where that is not kept.
template <class T>
std::int64_t scores_bytes(std::int64_t queries, std::int64_t keys, bool causal, bool from_probs) {
  Shape shape{};
  shape.queries = static_cast<int>(queries), shape.keys = static_cast<int>(keys), shape.causal = causal;
  return probs_elements_of(shape) * static_cast<std::int64_t>(sizeof(T)) * (from_probs ? 1 : 2);
}

template <class T, int D>
BackwardPlan BackwardKernels<T, D>::plan(const Problem& p, bool from_probs, int layers) {
  using Tiles = tiled::OwnerTiles<D, tiled::Values::one>;
  const std::int64_t bytes = scores_bytes<T>(p.queries, p.keys, p.causal, from_probs);
  // dS goes through memory where the values of all layers do not stay in shared memory.
  const bool through_memory = !tiled::OwnerTiles<D, tiled::Values::resident>::fits(layers);
  const int heads = through_memory ? tiled::scores_heads(p.batch, p.heads, p.heads / p.kv_heads, bytes, from_probs) : 0;
  return {false, Tiles::queries, Tiles::keys, heads > 0 ? 0 : Tiles::dq_elements, heads * bytes};
}

template <class T, int D>
void BackwardKernels<T, D>::owner(const BackwardParams& p, const char* function, cudaStream_t stream) {
  if (p.scores != nullptr) {
    const Shape& s = p.shape;
    if (p.probs != nullptr) return tiled::launch_scores<T, D, true>(p, p.probs, p.scores, function, stream);
    const std::int64_t bytes = scores_bytes<T>(s.queries, s.keys, s.causal, false);
    const int together = tiled::scores_heads(s.batch, s.heads, s.group, bytes, false);
    const auto run = [&](const BackwardParams& part, int heads) {
      tiled::launch_scores<T, D, false>(part, static_cast<char*>(p.scores) + heads * bytes / 2, p.scores, function, stream);
    };
    if (together == s.batch * s.heads) return run(p, together);
    for (int row = 0; row < s.batch; ++row)
      for (int head = 0; head < s.heads; head += together) {
        const int heads = std::min(together, s.heads - head);
        run(tiled::part_of<T>(p, row, head, heads), heads);
      }
    return;
  }
  if (p.layers == 1) return tiled::launch_owner<T, D, tiled::Values::one>(p, function, stream);
  // At D = 64 P's slot waits for dS to be read: where a step is short, making P again is faster (H200, 8192 keys, groups of 2,
  // 3 and 4: 4.12, 4.25 and 4.30 ms, from lse 3.75, 4.03 and 4.67).
  const bool reads_probs = p.probs != nullptr && (D == 128 || p.layers >= 4);
  if (tiled::OwnerTiles<D, tiled::Values::resident>::fits(p.layers))
    return reads_probs ? tiled::launch_owner<T, D, tiled::Values::kept>(p, function, stream)
                       : tiled::launch_owner<T, D, tiled::Values::resident>(p, function, stream);
  tiled::launch_owner<T, D, tiled::Values::streamed>(p, function, stream);
}

template <class T, int D>
void BackwardKernels<T, D>::values(const BackwardParams& p, const char* function, cudaStream_t stream) {
  if (p.probs != nullptr)
    tiled::launch_values_from_probs<T, D>(p, {p.probs, p.dout[0], p.dv, p.float_dv, 1.0f}, function, stream);
  else
    tiled::launch_values<T, D>(p, function, stream);
}

}  // namespace effcore::cuda::attention::hopper
