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
#include "engine.h"
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
    keys = pieces.take<T>(job.source == Source::probs ? 0 : packed_elements<T>(p.head_dim, p.keys));
    values = pieces.take<T>(packed_elements<T>(p.keys, p.value_dim));
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
    pack_transposed(packed.keys, p.head_dim, s.begin, row_of<Storage>(job.k, s.batch, s.kv_head, s.begin), job.k.stride[2],
                    s.end - s.begin, valid.begin, valid.end);
  pack_rows(packed.values, p.keys, s.begin, row_of<Storage>(job.v, s.batch, s.kv_head, s.begin), job.v.stride[2],
            s.end - s.begin, p.value_dim, valid.begin, valid.end);
}

template <class E>
void rows(const ForwardJob& job, std::int64_t task) {
  using Storage = typename E::Storage;
  using T = typename E::Accumulator;
  const Problem& p = job.problem;
  const std::int64_t blocks = (p.queries + E::row_block - 1) / E::row_block, group = p.heads / p.kv_heads;
  const std::int64_t head = task / (group * blocks), number = job.wave.first + head;
  const std::int64_t b = number / p.kv_heads, h = number % p.kv_heads * group + task / blocks % group;
  // The last rows see most and come first.
  const std::int64_t first = (blocks - 1 - task % blocks) * E::row_block, count = least(E::row_block, p.queries - first);
  const ForwardPack<E> packed(job, job.wave.packed + head * job.wave.packed_bytes);

  const std::int64_t begin = visible_keys(p, b, first).begin / probs_tile * probs_tile;
  const std::int64_t end = most(begin, visible_keys(p, b, first + count - 1).end);
  const bool keep = job.source == Source::scores && job.probs != nullptr;
  const std::int64_t block_keys = keep ? round_up(end - begin, probs_tile) : E::forward_keys;
  const std::int64_t value_stride = round_up(p.value_dim, width<T>);

  const auto lay_out = [&](Pieces& pieces, T*& q, T*& scores, T*& sums, T*& maximum, T*& sum, Visibility& seen) {
    q = pieces.take<T>(E::row_block * p.head_dim);
    scores = pieces.take<T>(E::row_block * block_keys);
    sums = pieces.take<T>(E::row_block * value_stride);
    maximum = pieces.take<T>(E::row_block);
    sum = pieces.take<T>(E::row_block);
    seen.begin = pieces.take<std::int32_t>(E::row_block);
    seen.end = pieces.take<std::int32_t>(E::row_block);
  };
  T *q, *scores, *sums, *maximum, *sum;
  Visibility seen;
  Pieces measure(nullptr);
  lay_out(measure, q, scores, sums, maximum, sum, seen);
  Pieces pieces(static_cast<char*>(scratch::get(scratch::Slot::local, measure.bytes_from(nullptr))));
  lay_out(pieces, q, scores, sums, maximum, sum, seen);

  const std::int64_t row_number = (b * p.heads + h) * p.queries + first;
  const T factor = static_cast<T>(p.scale * log2_e);
  if (job.source != Source::probs)
    for (std::int64_t r = 0; r < count; ++r)
      load_row(q + r * p.head_dim, row_of<Storage>(job.q, b, h, first + r), p.head_dim, p.head_dim);
  fill(sums, count * value_stride, T(0));
  for (std::int64_t r = 0; r < count; ++r) {
    maximum[r] = job.source == Source::lse ? static_cast<const T*>(job.lse)[row_number + r] * static_cast<T>(log2_e) : -infinity<T>;
    sum[r] = 0;
  }

  for (std::int64_t key = begin; key < end; key += block_keys) {
    const std::int64_t keys = least(block_keys, end - key), padded = round_up(keys, probs_tile);
    look(p, b, first, count, key, keys, seen);
    if (job.source == Source::probs) {
      load_probs<Storage>(p, job.probs, b * p.heads + h, first, count, key, padded, scores, block_keys);
    } else {
      Product<T> qk;
      qk.m = count, qk.n = keys, qk.k = p.head_dim;
      qk.a = q, qk.a_row = p.head_dim;
      qk.b = packed.keys + key * p.head_dim, qk.b_panel = p.head_dim * panel<T>;
      qk.c = scores, qk.c_row = block_keys, qk.add = false;
      qk.columns = seen.end;
      multiply(qk);
      for (std::int64_t r = 0; r < count; ++r) {
        T* row = scores + r * block_keys;
        if (job.source == Source::lse) {
          row_exponentials(row, seen.begin[r], seen.end[r], padded, factor, maximum[r]);
          continue;
        }
        const T m = row_maximum(row, seen.begin[r], seen.end[r], factor);
        const T higher = m > maximum[r] ? m : maximum[r];
        const T shift = higher == -infinity<T> ? T(0) : higher;
        const T more = row_exponentials(row, seen.begin[r], seen.end[r], padded, factor, shift);
        if (higher > maximum[r] && key > begin) {
          const T correction = static_cast<T>(std::exp2(maximum[r] - shift));
          sum[r] *= correction;
          for (std::int64_t d = 0; d < value_stride; ++d) sums[r * value_stride + d] *= correction;
        }
        maximum[r] = higher;
        sum[r] += more;
      }
    }
    Product<T> pv;
    pv.m = count, pv.n = p.value_dim, pv.k = keys;
    pv.a = scores, pv.a_row = block_keys;
    pv.b = packed.values + key * panel<T>, pv.b_panel = p.keys * panel<T>;
    pv.c = sums, pv.c_row = value_stride;
    pv.k_end = seen.end;
    multiply(pv);
  }

  if (job.source == Source::scores) {
    T* lse = static_cast<T*>(job.lse) + row_number;
    for (std::int64_t r = 0; r < count; ++r) {
      const KeyRange range = visible_keys(p, b, first + r);
      const bool sees = range.end > range.begin;
      // Scores that are all -inf have no softmax: NaN, as 0 / 0 would give.
      if (sees && sum[r] == 0) sum[r] = static_cast<T>(__builtin_nan(""));
      lse[r] = sees ? static_cast<T>((maximum[r] + std::log2(sum[r])) * ln_2) : -infinity<T>;
      sum[r] = sees ? 1 / sum[r] : T(0);
    }
    if (keep) keep_probs<Storage>(p, job.probs, b * p.heads + h, first, count, begin, end, scores, block_keys, sum);
  } else {
    fill(sum, count, T(1));
  }
  for (std::int64_t r = 0; r < count; ++r)
    store_row(const_cast<Storage*>(row_of<Storage>(job.out, b, h, first + r)), sums + r * value_stride, p.value_dim, sum[r]);
}

template <class E>
constexpr ForwardKernels kernels = {E::row_block, packed_bytes<E>, pack<E>, rows<E>};

}  // namespace

const ForwardKernels& forward_kernels(DType dtype) {
  switch (dtype) {
    case DType::float64: return kernels<Simd<double, double>>;
    case DType::bfloat16: return kernels<Simd<bfloat16, float>>;
    case DType::float16: return kernels<Simd<float16, float>>;
    default: return kernels<Simd<float, float>>;
  }
}

}  // namespace effcore::attention::EFFCORE_ISA
