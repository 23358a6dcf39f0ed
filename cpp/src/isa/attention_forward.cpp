// O = softmax(scale Q K^T + visibility) V, and O = P V for a layer that shares P.
//
// Bound: FLOPs, 2 queries keys (head_dim + value_dim) a head; the exponentials add a tenth at head_dim 64.
// A task holds one block of query rows: Q [row_block, D], the sums O [row_block, Dv], a block of scores
// [row_block, forward_keys] in the second-level cache. K (transposed) and V are packed once for each kv head and shared by
// all its tasks. Over the blocks of keys the running maximum m and sum l follow the online softmax:
//   m' = max(m, max S),  l' = l 2^(m - m') + sum 2^(S - m'),  O' = O 2^(m - m') + 2^(S - m') V
// Where P is kept, its row must be complete before it can be divided by l: the block of keys is then the whole row.
#include <cmath>

#include "../scratch.h"
#include "engines.h"
#include "probs.h"
#include "softmax.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

template <class E>
struct ForwardPack {
  using T = typename E::Operand;
  T* keys;
  T* values;
  std::int64_t bytes;
  ForwardPack(const ForwardJob& job, char* memory) {
    const Problem& p = job.problem;
    Pieces pieces(memory);
    keys = pieces.take<T>(job.source == Source::probs ? 0 : packed_elements<E>(p.head_dim, p.keys));
    values = pieces.take<T>(packed_elements<E>(p.keys, p.value_dim));
    bytes = pieces.bytes_from(memory);
  }
};

template <class E>
std::int64_t packed_bytes(const ForwardJob& job) {
  return ForwardPack<E>(job, nullptr).bytes;
}

template <class E>
void pack(const ForwardJob& job, std::int64_t task) {
  using Storage = typename E::Storage;
  const Problem& p = job.problem;
  const Segment s = segment_of(p, job.wave, task);
  const KeyRange valid = valid_keys(p, s.batch, s.begin);
  const ForwardPack<E> packed(job, job.wave.packed + s.head * job.wave.packed_bytes);
  if (job.source != Source::probs)
    E::pack_transposed(packed.keys, p.head_dim, s.begin, row_of<Storage>(job.k, s.batch, s.kv_head, s.begin), job.k.stride[2],
                       s.end - s.begin, valid.begin, valid.end);
  E::pack_rows(packed.values, depth<E>(p.keys), s.begin, row_of<Storage>(job.v, s.batch, s.kv_head, s.begin), job.v.stride[2],
               s.end - s.begin, p.value_dim, valid.begin, valid.end);
}

// What a task needs for its block of rows.
template <class E>
struct ForwardScratch {
  using T = typename E::Accumulator;
  using Operand = typename E::Operand;
  Operand* q;  // [row_block, depth(D)]
  T* scores;   // [row_block, block_keys]
  Operand* p;  // the same as a left operand (the scores themselves where that is of their type)
  T* sums;     // [row_block, padded Dv]
  T *maximum, *sum;
  Visibility seen;
  std::int64_t bytes;
  ForwardScratch(const Problem& problem, std::int64_t block_keys, char* memory) {
    Pieces pieces(memory);
    q = pieces.take<Operand>(E::row_block * depth<E>(problem.head_dim));
    scores = pieces.take<T>(E::row_block * block_keys);
    if constexpr (std::is_same_v<Operand, T>)
      p = scores;
    else
      p = pieces.take<Operand>(E::row_block * block_keys);
    sums = pieces.take<T>(E::row_block * round_up(problem.value_dim, width<T>));
    maximum = pieces.take<T>(E::row_block);
    sum = pieces.take<T>(E::row_block);
    seen.begin = pieces.take<std::int32_t>(E::row_block);
    seen.end = pieces.take<std::int32_t>(E::row_block);
    bytes = pieces.bytes_from(memory);
  }
};

// P of one block of keys from its scores, and what the running maximum and sum become.
template <bool keep, class E>
void softmax_block(const ForwardJob& job, const ForwardScratch<E>& x, std::int64_t count, std::int64_t padded,
                   std::int64_t block_keys, std::int64_t value_stride, bool first_block) {
  using T = typename E::Accumulator;
  const T factor = static_cast<T>(job.problem.scale * log2_e);
  constexpr bool in_place = keep || std::is_same_v<typename E::Operand, T>;
  for (std::int64_t r = 0; r < count; ++r) {
    T* row = x.scores + r * block_keys;
    const std::int64_t begin = x.seen.begin[r], end = x.seen.end[r];
    if (job.source == Source::lse) {
      row_exponentials<in_place>(row, x.p + r * block_keys, begin, end, padded, factor, x.maximum[r]);
      continue;
    }
    const T m = row_maximum(row, begin, end, factor), before = x.maximum[r], higher = m > before ? m : before;
    const T shift = higher == -infinity<T> ? T(0) : higher;
    const T more = row_exponentials<in_place>(row, x.p + r * block_keys, begin, end, padded, factor, shift);
    if (higher > before && !first_block) {
      const T correction = static_cast<T>(std::exp2(before - shift));
      x.sum[r] *= correction;
      for (std::int64_t d = 0; d < value_stride; ++d) x.sums[r * value_stride + d] *= correction;
    }
    x.maximum[r] = higher;
    x.sum[r] += more;
  }
}

template <class E>
void rows(const ForwardJob& job, std::int64_t task) {
  using Storage = typename E::Storage;
  using T = typename E::Accumulator;
  using Operand = typename E::Operand;
  const Problem& p = job.problem;
  const std::int64_t blocks = (p.queries + E::row_block - 1) / E::row_block, group = p.heads / p.kv_heads;
  const std::int64_t head = task / (group * blocks), number = job.wave.first + head;
  const std::int64_t b = number / p.kv_heads, h = number % p.kv_heads * group + task / blocks % group;
  // The last rows see most and come first.
  const std::int64_t first = (blocks - 1 - task % blocks) * E::row_block, count = least(E::row_block, p.queries - first);
  const ForwardPack<E> packed(job, job.wave.packed + head * job.wave.packed_bytes);

  const KeyRange range = visible_keys(p, b, first, first + count - 1);
  const std::int64_t begin = range.begin / probs_tile * probs_tile, end = range.end;
  const bool keep = job.source == Source::scores && job.probs != nullptr;
  const std::int64_t block_keys = keep ? round_up(end - begin, probs_tile) : E::forward_keys;
  const std::int64_t value_stride = round_up(p.value_dim, width<T>), head_depth = depth<E>(p.head_dim);
  const std::int64_t bytes = ForwardScratch<E>(p, block_keys, nullptr).bytes;
  const ForwardScratch<E> x(p, block_keys, static_cast<char*>(scratch::get(scratch::Slot::local, bytes)));
  [[maybe_unused]] const typename E::Session session;

  const std::int64_t head_number = b * p.heads + h, row_number = head_number * p.queries + first;
  if (job.source != Source::probs)
    for (std::int64_t r = 0; r < count; ++r)
      load_row(x.q + r * head_depth, row_of<Storage>(job.q, b, h, first + r), p.head_dim, head_depth);
  zero(x.sums, count * value_stride);
  for (std::int64_t r = 0; r < count; ++r) {
    x.maximum[r] =
        job.source == Source::lse ? static_cast<const T*>(job.lse)[row_number + r] * static_cast<T>(log2_e) : -infinity<T>;
    x.sum[r] = 0;
  }

  for (std::int64_t key = begin; key < end; key += block_keys) {
    const std::int64_t keys = least(block_keys, end - key), padded = round_up(keys, probs_tile);
    look(p, b, first, count, key, keys, x.seen);
    if (job.source == Source::probs) {
      load_probs<Storage>(p, job.probs, head_number, first, count, key, padded, x.p, block_keys);
    } else {
      Product<Operand, T> qk;
      qk.m = count, qk.n = keys, qk.k = p.head_dim;
      qk.a = x.q, qk.a_row = head_depth;
      qk.b = packed.keys + key * head_depth, qk.b_panel = head_depth * E::panel;
      qk.c = x.scores, qk.c_row = block_keys, qk.add = false;
      qk.columns = x.seen.end;
      E::multiply(qk);
      (keep ? softmax_block<true, E> : softmax_block<false, E>)(job, x, count, padded, block_keys, value_stride, key == begin);
    }
    Product<Operand, T> pv;
    pv.m = count, pv.n = p.value_dim, pv.k = keys;
    pv.a = x.p, pv.a_row = block_keys;
    pv.b = packed.values + key * E::panel, pv.b_panel = depth<E>(p.keys) * E::panel;
    pv.c = x.sums, pv.c_row = value_stride;
    pv.k_end = x.seen.end;
    E::multiply(pv);
  }

  T* sum = x.sum;
  if (job.source == Source::scores) {
    T* lse = static_cast<T*>(job.lse) + row_number;
    for (std::int64_t r = 0; r < count; ++r) {
      const bool sees = sees_keys(p, b, first + r);
      // Scores that are all -inf have no softmax: NaN, as 0 / 0 would give.
      if (sees && sum[r] == 0) sum[r] = static_cast<T>(__builtin_nan(""));
      lse[r] = sees ? static_cast<T>((x.maximum[r] + std::log2(sum[r])) * ln_2) : -infinity<T>;
      sum[r] = sees ? 1 / sum[r] : T(0);
    }
    if (keep) keep_probs<Storage>(p, job.probs, head_number, first, count, begin, end, x.scores, block_keys, sum);
  } else {
    fill(sum, count, T(1));
  }
  for (std::int64_t r = 0; r < count; ++r) {
    if (!sees_keys(p, b, first + r)) zero(x.sums + r * value_stride, value_stride);
    store_row(const_cast<Storage*>(row_of<Storage>(job.out, b, h, first + r)), x.sums + r * value_stride, p.value_dim, sum[r]);
  }
}

template <class E>
struct Family {
  static constexpr ForwardKernels kernels = {E::row_block, packed_bytes<E>, pack<E>, rows<E>};
};

}  // namespace

const ForwardKernels& forward_kernels(DType dtype) {
  return choose<Family>(dtype);
}

}  // namespace effcore::attention::EFFCORE_ISA
