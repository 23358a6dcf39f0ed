// Gradients of attention, of one layer or of all layers that share its P:
//   P = 2^(scale log2(e) Q K^T - log2(e) lse)  (or kept),   dP = sum_l dO_l V_l^T,   delta = sum_l rowsum(dO_l * O_l)
//   dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO_0
//
// Bound: FLOPs, 2 queries keys (3 head_dim + (layers + 1) value_dim) a head, less the first head_dim where P is kept.
// A task walks over its blocks of query rows [row_block] and, inside, over blocks of keys [backward_keys]: S, dP and dS of one
// block stay in the second-level cache and feed all products. dQ of a block of rows is complete at its end. dK and dV are sums
// over rows, kept for each task apart, [keys, D] and [keys, Dv], and added up in the order of the tasks afterwards: no two
// threads write one number, and the order of summation depends on nothing but the shapes.
// A consumer (layers == 0) has the first and the last product alone.
#include "../scratch.h"
#include "engines.h"
#include "probs.h"
#include "softmax.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

template <class E>
struct BackwardPack {
  using T = typename E::Operand;
  T* keys_transposed;  // [D, keys], for S
  T* keys;             // [keys, D], for dQ
  T* values;           // layers times [Dv, keys], for dP
  std::int64_t values_elements, bytes;
  BackwardPack(const BackwardJob& job, char* memory) {
    const Problem& p = job.problem;
    Pieces pieces(memory);
    keys_transposed = pieces.take<T>(job.source == Source::probs ? 0 : packed_elements<E>(p.head_dim, p.keys));
    keys = pieces.take<T>(job.layers == 0 ? 0 : packed_elements<E>(p.keys, p.head_dim));
    values_elements = packed_elements<E>(p.value_dim, p.keys);
    values = pieces.take<T>(job.layers * values_elements);
    bytes = pieces.bytes_from(memory);
  }
};

// A task's sums of dK [keys, D] and dV [keys, Dv], rows padded to whole vectors.
template <class T>
struct Partial {
  T *dk, *dv;
  std::int64_t dk_stride, dv_stride, bytes;
  Partial(const BackwardJob& job, char* memory) {
    const Problem& p = job.problem;
    Pieces pieces(memory);
    dk_stride = round_up(p.head_dim, width<T>);
    dv_stride = round_up(p.value_dim, width<T>);
    const std::int64_t rows = round_up(p.keys, probs_tile);  // a product may write whole tiles
    dk = pieces.take<T>(job.layers == 0 ? 0 : rows * dk_stride);
    dv = pieces.take<T>(rows * dv_stride);
    bytes = pieces.bytes_from(memory);
  }
};

template <class E>
std::int64_t packed_bytes(const BackwardJob& job) {
  return BackwardPack<E>(job, nullptr).bytes;
}
template <class E>
std::int64_t partial_bytes(const BackwardJob& job) {
  return Partial<typename E::Accumulator>(job, nullptr).bytes;
}

template <class E>
void pack(const BackwardJob& job, std::int64_t task) {
  using Storage = typename E::Storage;
  const Problem& p = job.problem;
  const Segment s = segment_of(p, job.wave, task);
  const KeyRange valid = valid_keys(p, s.batch, s.begin);
  const std::int64_t rows = s.end - s.begin;
  const BackwardPack<E> packed(job, job.wave.packed + s.head * job.wave.packed_bytes);
  if (job.source != Source::probs)
    E::pack_transposed(packed.keys_transposed, p.head_dim, s.begin, row_of<Storage>(job.k, s.batch, s.kv_head, s.begin),
                       job.k.stride[2], rows, valid.begin, valid.end);
  if (job.layers > 0)
    E::pack_rows(packed.keys, depth<E>(p.keys), s.begin, row_of<Storage>(job.k, s.batch, s.kv_head, s.begin), job.k.stride[2],
                 rows, p.head_dim, valid.begin, valid.end);
  for (int l = 0; l < job.layers; ++l)
    E::pack_transposed(packed.values + l * packed.values_elements, p.value_dim, s.begin,
                       row_of<Storage>(job.v[l], s.batch, s.kv_head, s.begin), job.v[l].stride[2], rows, valid.begin,
                       valid.end);
}

// What a task needs for one block of rows. Where operands are of another type than sums, P and dS exist as both.
template <class E>
struct RowScratch {
  using T = typename E::Accumulator;
  using Operand = typename E::Operand;
  Operand* q;            // [row_block, depth(D)], a left operand
  Operand* q_packed;     // the same as a right operand
  Operand* dout;         // [layers][row_block, depth(Dv)]
  Operand* dout_packed;  // of layer 0
  T *p, *dp;             // [row_block, backward_keys]
  Operand *p_operand, *ds;
  Operand* transposed;  // of P or dS, if the engine wants it
  T* dq;                // [row_block, padded D]
  T* delta;             // [row_block]
  T* shift;             // [row_block], log2(e) lse
  Visibility seen;
  std::int32_t* first_row;  // [backward_keys]: the first row that sees a key
  std::int64_t bytes;
  RowScratch(const BackwardJob& job, char* memory) {
    const Problem& problem = job.problem;
    const std::int64_t layers = most(job.layers, 1), block = E::row_block * E::backward_keys;
    Pieces pieces(memory);
    q = pieces.take<Operand>(E::row_block * depth<E>(problem.head_dim));
    q_packed = pieces.take<Operand>(packed_elements<E>(E::row_block, problem.head_dim));
    dout = pieces.take<Operand>(layers * E::row_block * depth<E>(problem.value_dim));
    dout_packed = pieces.take<Operand>(packed_elements<E>(E::row_block, problem.value_dim));
    p = pieces.take<T>(block);
    dp = pieces.take<T>(block);
    if constexpr (std::is_same_v<Operand, T>) {
      p_operand = p;
      ds = dp;
    } else {
      p_operand = pieces.take<Operand>(block);
      ds = pieces.take<Operand>(block);
    }
    transposed = pieces.take<Operand>(E::transposed_elements);
    dq = pieces.take<T>(E::row_block * round_up(problem.head_dim, width<T>));
    delta = pieces.take<T>(E::row_block);
    shift = pieces.take<T>(E::row_block);
    seen.begin = pieces.take<std::int32_t>(E::row_block);
    seen.end = pieces.take<std::int32_t>(E::row_block);
    first_row = pieces.take<std::int32_t>(E::backward_keys);
    bytes = pieces.bytes_from(memory);
  }
};

// delta = rowsum(dO * O) of this layer, and of the others
template <class E>
void row_deltas(const BackwardJob& job, std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t count,
                typename E::Accumulator* delta) {
  using Storage = typename E::Storage;
  using T = typename E::Accumulator;
  const Problem& p = job.problem;
  const std::int64_t number = (b * p.heads + h) * p.queries + first, whole = p.value_dim / width<T> * width<T>;
  for (std::int64_t r = 0; r < count; ++r) {
    const Storage *out = row_of<Storage>(job.out, b, h, first + r), *dout = row_of<Storage>(job.dout[0], b, h, first + r);
    Vector<T> sums{};
    for (std::int64_t d = 0; d < whole; d += width<T>) sums += load_as(dout + d, T{}) * load_as(out + d, T{});
    T sum = horizontal_sum<T>(sums);
    for (std::int64_t d = whole; d < p.value_dim; ++d) sum += to_float(dout[d]) * to_float(out[d]);
    delta[r] = sum;
    if (job.delta != nullptr) static_cast<T*>(job.delta)[number + r] = sum;
    if (job.consumers_delta != nullptr) delta[r] += static_cast<const T*>(job.consumers_delta)[number + r];
  }
}

template <class E>
void load_block(const BackwardJob& job, const RowScratch<E>& x, std::int64_t b, std::int64_t h, std::int64_t first,
                std::int64_t count) {
  using Storage = typename E::Storage;
  using T = typename E::Accumulator;
  const Problem& p = job.problem;
  const std::int64_t head_depth = depth<E>(p.head_dim), value_depth = depth<E>(p.value_dim);
  const Storage *q = row_of<Storage>(job.q, b, h, first), *dout = row_of<Storage>(job.dout[0], b, h, first);
  if (job.source != Source::probs)
    for (std::int64_t r = 0; r < count; ++r) load_row(x.q + r * head_depth, q + r * job.q.stride[2], p.head_dim, head_depth);
  for (std::int64_t l = 0; l < job.layers; ++l)
    for (std::int64_t r = 0; r < count; ++r)
      load_row(x.dout + (l * E::row_block + r) * value_depth, row_of<Storage>(job.dout[l], b, h, first + r), p.value_dim,
               value_depth);
  if (job.layers > 0) E::pack_rows(x.q_packed, E::row_block, 0, q, job.q.stride[2], count, p.head_dim, 0, count);
  E::pack_rows(x.dout_packed, E::row_block, 0, dout, job.dout[0].stride[2], count, p.value_dim, 0, count);
  row_deltas<E>(job, b, h, first, count, x.delta);
  const T* lse = static_cast<const T*>(job.lse) + (b * p.heads + h) * p.queries + first;
  for (std::int64_t r = 0; r < count; ++r) x.shift[r] = lse[r] * static_cast<T>(log2_e);
}

template <class E>
void row_block(const BackwardJob& job, const BackwardPack<E>& packed, const Partial<typename E::Accumulator>& partial,
               const RowScratch<E>& x, std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t count) {
  using Storage = typename E::Storage;
  using T = typename E::Accumulator;
  using Operand = typename E::Operand;
  const Problem& p = job.problem;
  constexpr std::int64_t stride = E::backward_keys;
  const std::int64_t dq_stride = round_up(p.head_dim, width<T>);
  const std::int64_t head_depth = depth<E>(p.head_dim), value_depth = depth<E>(p.value_dim);
  const T factor = static_cast<T>(p.scale * log2_e);
  const bool owner = job.layers > 0;
  load_block(job, x, b, h, first, count);
  zero(x.dq, count * dq_stride);

  const KeyRange range = visible_keys(p, b, first, first + count - 1);
  const std::int64_t begin = range.begin / probs_tile * probs_tile, end = range.end;
  for (std::int64_t key = begin; key < end; key += stride) {
    const std::int64_t keys = least(stride, end - key), padded = round_up(keys, probs_tile);
    look(p, b, first, count, key, keys, x.seen);
    for (std::int64_t j = 0, r = 0; j < keys; ++j) {
      while (r < count - 1 && x.seen.end[r] <= j) ++r;
      x.first_row[j] = static_cast<std::int32_t>(r);
    }
    if (job.source == Source::probs) {
      load_probs<Storage>(p, job.probs, b * p.heads + h, first, count, key, padded, x.p_operand, stride);
      if constexpr (!std::is_same_v<Operand, T>)
        for (std::int64_t r = 0; owner && r < count; ++r) load_row(x.p + r * stride, x.p_operand + r * stride, padded, padded);
    } else {
      Product<Operand, T> s;
      s.m = count, s.n = keys, s.k = p.head_dim;
      s.a = x.q, s.a_row = head_depth;
      s.b = packed.keys_transposed + key * head_depth, s.b_panel = head_depth * E::panel;
      s.c = x.p, s.c_row = stride, s.add = false;
      s.columns = x.seen.end;
      E::multiply(s);
      for (std::int64_t r = 0; r < count; ++r)
        row_exponentials<true>(x.p + r * stride, x.p_operand + r * stride, x.seen.begin[r], x.seen.end[r], padded, factor,
                               x.shift[r]);
    }
    Product<Operand, T> outer;  // dV += P^T dO
    outer.m = keys, outer.n = p.value_dim, outer.k = count;
    outer.b = x.dout_packed, outer.b_panel = E::row_block * E::panel;
    outer.c = partial.dv + key * partial.dv_stride, outer.c_row = partial.dv_stride;
    outer.k_begin = x.first_row;
    E::set_transposed(outer, x.p_operand, stride, count, keys, x.transposed);
    E::multiply(outer);
    if (!owner) continue;

    for (int l = 0; l < job.layers; ++l) {
      Product<Operand, T> dp;
      dp.m = count, dp.n = keys, dp.k = p.value_dim;
      dp.a = x.dout + l * E::row_block * value_depth, dp.a_row = value_depth;
      dp.b = packed.values + l * packed.values_elements + key * value_depth, dp.b_panel = value_depth * E::panel;
      dp.c = x.dp, dp.c_row = stride, dp.add = l > 0;
      dp.columns = x.seen.end;
      E::multiply(dp);
    }
    for (std::int64_t r = 0; r < count; ++r)
      row_score_gradients(x.dp + r * stride, x.p + r * stride, x.ds + r * stride, x.seen.begin[r], x.seen.end[r], padded,
                          x.delta[r]);
    outer.n = p.head_dim;  // dK += dS^T Q
    outer.b = x.q_packed;
    outer.c = partial.dk + key * partial.dk_stride, outer.c_row = partial.dk_stride;
    E::set_transposed(outer, x.ds, stride, count, keys, x.transposed);
    E::multiply(outer);
    Product<Operand, T> dq;
    dq.m = count, dq.n = p.head_dim, dq.k = keys;
    dq.a = x.ds, dq.a_row = stride;
    dq.b = packed.keys + key * E::panel, dq.b_panel = depth<E>(p.keys) * E::panel;
    dq.c = x.dq, dq.c_row = dq_stride;
    dq.k_end = x.seen.end;
    E::multiply(dq);
  }
  if (!owner) return;
  for (std::int64_t r = 0; r < count; ++r) {
    if (!sees_keys(p, b, first + r)) zero(x.dq + r * dq_stride, dq_stride);
    store_row(const_cast<Storage*>(row_of<Storage>(job.dq, b, h, first + r)), x.dq + r * dq_stride, p.head_dim,
              static_cast<T>(p.scale));
  }
}

template <class E>
void rows(const BackwardJob& job, std::int64_t task) {
  using T = typename E::Accumulator;
  const Problem& p = job.problem;
  const std::int64_t head = task / job.splits, split = task % job.splits, number = job.wave.first + head;
  const std::int64_t b = number / p.kv_heads, group = p.heads / p.kv_heads;
  const std::int64_t blocks = (p.queries + E::row_block - 1) / E::row_block;
  const BackwardPack<E> packed(job, job.wave.packed + head * job.wave.packed_bytes);
  const Partial<T> partial(job, job.partial + task * job.partial_bytes);
  std::memset(job.partial + task * job.partial_bytes, 0, job.partial_bytes);
  const std::int64_t bytes = RowScratch<E>(job, nullptr).bytes;
  const RowScratch<E> scratch(job, static_cast<char*>(scratch::get(scratch::Slot::local, bytes)));
  [[maybe_unused]] const typename E::Session session;
  // Every splits-th block: with causal each split gets short and long ones.
  for (std::int64_t item = split; item < group * blocks; item += job.splits) {
    const std::int64_t h = number % p.kv_heads * group + item / blocks, first = item % blocks * E::row_block;
    row_block<E>(job, packed, partial, scratch, b, h, first, least(E::row_block, p.queries - first));
  }
}

template <class To, class T>
void store_sum(const TensorView& to, std::int64_t b, std::int64_t h, std::int64_t key, const T* row, std::int64_t n, T factor) {
  store_row(const_cast<To*>(row_of<To>(to, b, h, key)), row, n, factor);
}

template <class E>
void reduce(const BackwardJob& job, std::int64_t task) {
  using T = typename E::Accumulator;
  const Problem& p = job.problem;
  const Segment s = segment_of(p, job.wave, task);
  char* memory = job.partial + s.head * job.splits * job.partial_bytes;
  const Partial<T> sum(job, memory);
  const auto finish = [&](T* rows, std::int64_t stride, const TensorView& to, const TensorView& sum_before, std::int64_t n,
                          T factor) {
    for (std::int64_t key = s.begin; key < s.end; ++key) {
      T* row = rows + key * stride;
      for (std::int64_t split = 1; split < job.splits; ++split) {
        const T* other = reinterpret_cast<const T*>(reinterpret_cast<const char*>(row) + split * job.partial_bytes);
        for (std::int64_t d = 0; d < n; ++d) row[d] += other[d];
      }
      T rest = factor;
      if (sum_before.data != nullptr) {
        const T* before = row_of<T>(sum_before, s.batch, s.kv_head, key);
        for (std::int64_t d = 0; d < n; ++d) row[d] = row[d] * factor + before[d];
        rest = T(1);
      }
      if (to.dtype == p.dtype)
        store_sum<typename E::Storage>(to, s.batch, s.kv_head, key, row, n, rest);
      else
        store_sum<T>(to, s.batch, s.kv_head, key, row, n, rest);
    }
  };
  if (job.layers > 0) finish(sum.dk, sum.dk_stride, job.dk, job.dk_sum, p.head_dim, static_cast<T>(p.scale));
  finish(sum.dv, sum.dv_stride, job.dv, job.dv_sum, p.value_dim, T(1));
}

template <class E>
struct Family {
  static constexpr BackwardKernels kernels = {E::row_block, packed_bytes<E>, partial_bytes<E>, pack<E>, rows<E>, reduce<E>};
};

}  // namespace

const BackwardKernels& backward_kernels(DType dtype) {
  return choose<Family>(dtype);
}

}  // namespace effcore::attention::EFFCORE_ISA
