// One new token a row against a cache: O = softmax(scale q K^T) V, or O = P V with another layer's P.
//
// Bound: bytes. K and V are read once, as they lie; all query heads of a kv head use a row while it is in the first-level
// cache. The cache is cut in chunks of decode_chunk keys. A chunk yields its maximum c, weights w = 2^(S - c), their sum, and
// w V; a task works through a segment of chunks and keeps one running sum of w V. The second pass joins the segments of a
// head and turns maxima into the scale of each chunk, 2^(c - max) / sum, so that P = w scale.
#include <cmath>

#include "../scratch.h"
#include "engines.h"
#include "softmax.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

constexpr std::int64_t chunks_of(std::int64_t keys) {
  return (keys + decode_chunk - 1) / decode_chunk;
}

// The last n < width numbers of a row.
template <class T, class Storage>
inline Vector<T> load_tail(const Storage* from, std::int64_t n) {
  Vector<T> x{};
  for (std::int64_t i = 0; i < n; ++i) x[i] = to_float(from[i]);
  return x;
}

// Rows of q as the products below want them.
template <class E>
struct QueryOf {
  using type = typename E::Accumulator;
  static constexpr std::int64_t pad = width<type>;
};
#if defined(__AVX512BF16__)
template <>
struct QueryOf<Pairs> {
  using type = bfloat16;
  static constexpr std::int64_t pad = 2 * width<float>;
};

// Pairs of bfloat16 at a time: half the instructions of a conversion and a multiply-add, which bounded head_dim 64.
template <int heads>
[[gnu::always_inline]] inline void dot_pairs(const bfloat16* q, std::int64_t q_stride, const bfloat16* row,
                                             std::int64_t head_dim, Vector<float>* sum) {
  for (std::int64_t d = 0; d < head_dim; d += 32) {
    const __mmask32 mask = static_cast<__mmask32>(head_dim - d >= 32 ? 0xffffffffu : (1u << (head_dim - d)) - 1);
    const __m512bh key = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, row + d));
#pragma GCC unroll 16
    for (int g = 0; g < heads; ++g)
      sum[g] = reinterpret_cast<Vector<float>>(_mm512_dpbf16_ps(
          reinterpret_cast<__m512>(sum[g]), reinterpret_cast<__m512bh>(_mm512_loadu_si512(q + g * q_stride + d)), key));
  }
}
#endif
template <int heads, class T, class Storage>
[[gnu::always_inline]] inline void dot_row(const T* q, std::int64_t q_stride, const Storage* row, std::int64_t head_dim,
                                           Vector<T>* sum) {
  const std::int64_t whole = head_dim / width<T> * width<T>;
  const auto add = [&](std::int64_t d, Vector<T> key) {
#pragma GCC unroll 16
    for (int g = 0; g < heads; ++g) sum[g] += load(q + g * q_stride + d) * key;
  };
  for (std::int64_t d = 0; d < whole; d += width<T>) add(d, load_as(row + d, T{}));
  if (whole < head_dim) add(whole, load_tail<T>(row + whole, head_dim - whole));
}

// Rows are taken from this many places of a chunk in turn. One place after another reads at most a page at a time, and every
// page costs the prefetchers a new start: with 4 KiB pages a thread that reads bfloat16 gets 9 GB/s from memory one row after
// the other, 12 from four places, 14 when each also asks for what it needs `ahead` bytes later.
constexpr std::int64_t places = 4, ahead = 1024;

template <class Storage>
[[gnu::always_inline]] inline void prefetch_row(const Storage* row, std::int64_t row_stride, std::int64_t length) {
  const std::int64_t bytes = length * sizeof(Storage), rows = bytes < ahead ? ahead / bytes : 1;
  const char* line = reinterpret_cast<const char*>(row + rows * row_stride);
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
}

// scores[g][j] = q[g] . k[j] for `heads` rows of q, padded to q_stride. A vector of results at a time, width / heads keys of
// each head: a key is read once for all heads, and the sums across vectors end in one.
template <int heads, class T, class Query, class Storage>
void dot_rows(const Query* q, std::int64_t q_stride, std::int64_t head_dim, const Storage* k, std::int64_t row_stride,
              std::int64_t keys, T* scores) {
  constexpr std::int64_t batch = width<T> / heads, from = least(places, batch), run = batch / from;
  const std::int64_t part = keys / batch * run;  // keys of each place; what is left over comes after them
  for (std::int64_t j = 0; j < keys; j += j < from * part ? batch : run) {
    const bool whole = j < from * part;
    const auto key_of = [&](std::int64_t i) { return whole ? i / run * part + j / from + i % run : least(j + i, keys - 1); };
    Vector<T> sums[width<T>] = {};
    for (std::int64_t i = 0; i < (whole ? batch : run); ++i) {
      Vector<T> sum[heads] = {};
      const Storage* row = k + key_of(i) * row_stride;
      prefetch_row(row, row_stride, head_dim);
      if constexpr (std::is_same_v<Query, T>)
        dot_row<heads>(q, q_stride, row, head_dim, sum);
      else
        dot_pairs<heads>(q, q_stride, row, head_dim, sum);
#pragma GCC unroll 16
      for (int g = 0; g < heads; ++g) sums[g * batch + i] = sum[g];
    }
    const Vector<T> dots = sum_across<T>(sums);
    for (int g = 0; g < heads; ++g)
      for (std::int64_t i = 0; i < (whole ? batch : run); ++i) scores[g * decode_chunk + key_of(i)] = dots[g * batch + i];
  }
}

// sums[g] += sum over j of weights[g][j] v[j], a panel of vectors of the row at a time in registers
template <int heads, int vectors, class T, class Storage, class Load>
[[gnu::always_inline]] inline void add_panel(const T* weights, const Storage* v, std::int64_t row_stride, std::int64_t keys,
                                             T* sums, std::int64_t sums_stride, const Load& load_value) {
  Vector<T> sum[heads][vectors];
#pragma GCC unroll 16
  for (int g = 0; g < heads; ++g)
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) sum[g][i] = load(sums + g * sums_stride + i * width<T>);
  const auto add = [&](std::int64_t j) {
    const Storage* row = v + j * row_stride;
    prefetch_row(row, row_stride, vectors * width<T>);
    Vector<T> value[vectors];
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) value[i] = load_value(row + i * width<T>);
#pragma GCC unroll 16
    for (int g = 0; g < heads; ++g) {
      const Vector<T> w = broadcast(weights[g * decode_chunk + j]);
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) sum[g][i] += w * value[i];
    }
  };
  const std::int64_t part = keys / places;
  for (std::int64_t j = 0; j < part; ++j)
#pragma GCC unroll 4
    for (std::int64_t place = 0; place < places; ++place) add(place * part + j);
  for (std::int64_t j = places * part; j < keys; ++j) add(j);
#pragma GCC unroll 16
  for (int g = 0; g < heads; ++g)
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) store(sums + g * sums_stride + i * width<T>, sum[g][i]);
}

template <int heads, class T, class Storage>
void add_rows(const T* weights, const Storage* v, std::int64_t row_stride, std::int64_t keys, std::int64_t value_dim, T* sums,
              std::int64_t sums_stride) {
  const auto plain = [](const Storage* p) { return load_as(p, T{}); };
  constexpr int vectors = tile_vectors;
  std::int64_t d = 0;
  for (; d + vectors * width<T> <= value_dim; d += vectors * width<T>)
    add_panel<heads, vectors>(weights, v + d, row_stride, keys, sums + d, sums_stride, plain);
  for (; d + width<T> <= value_dim; d += width<T>)
    add_panel<heads, 1>(weights, v + d, row_stride, keys, sums + d, sums_stride, plain);
  if (d < value_dim)
    add_panel<heads, 1>(weights, v + d, row_stride, keys, sums + d, sums_stride,
                        [&](const Storage* p) { return load_tail<T>(p, value_dim - d); });
}

// Calls visit(first head, number of heads as a constant) for a group cut in fours, twos and ones.
template <class T, class Visit>
inline void for_heads(std::int64_t group, const Visit& visit) {
  std::int64_t g = 0;
  if constexpr (width<T> >= 4)
    for (; g + 4 <= group; g += 4) visit(g, std::integral_constant<int, 4>{});
  for (; g + 2 <= group; g += 2) visit(g, std::integral_constant<int, 2>{});
  for (; g < group; ++g) visit(g, std::integral_constant<int, 1>{});
}

template <class E>
void segment(const DecodeJob& job, std::int64_t task) {
  using Storage = typename E::Storage;
  using T = typename E::Accumulator;
  using Query = typename QueryOf<E>::type;
  const Problem& p = job.problem;
  const std::int64_t number = task / job.segments, segment = task % job.segments;
  const std::int64_t b = number / p.kv_heads, kv_head = number % p.kv_heads, group = p.heads / p.kv_heads;
  const std::int64_t head = b * p.heads + kv_head * group, chunks = chunks_of(p.keys);
  const KeyRange seen = visible_keys(p, b, 0);
  const T factor = static_cast<T>(p.scale * log2_e);

  const std::int64_t q_stride = round_up(p.head_dim, QueryOf<E>::pad), sums_stride = round_up(p.value_dim, width<T>);
  const auto lay_out = [&](Pieces& pieces, Query*& q, T*& scores, T*& sums, T*& maxima) {
    q = pieces.take<Query>(group * q_stride);
    scores = pieces.take<T>(group * decode_chunk);
    sums = pieces.take<T>(group * sums_stride);
    maxima = pieces.take<T>(group);
  };
  Query* q;
  T *scores, *sums, *maxima;
  Pieces measure(nullptr);
  lay_out(measure, q, scores, sums, maxima);
  Pieces pieces(static_cast<char*>(scratch::get(scratch::Slot::local, measure.bytes_from(nullptr))));
  lay_out(pieces, q, scores, sums, maxima);

  if (!job.from_probs)
    for (std::int64_t g = 0; g < group; ++g)
      load_row(q + g * q_stride, row_of<Storage>(job.q, b, kv_head * group + g, 0), p.head_dim, q_stride);
  zero(sums, group * sums_stride);
  fill(maxima, group, -infinity<T>);

  const std::int64_t last_chunk = least(chunks, (segment + 1) * job.segment_chunks);
  for (std::int64_t chunk = segment * job.segment_chunks; chunk < last_chunk; ++chunk) {
    const std::int64_t key = chunk * decode_chunk, keys = least(decode_chunk, p.keys - key);
    const std::int64_t begin = most(0, least(seen.begin - key, keys)), end = most(begin, least(seen.end - key, keys));
    if (job.from_probs) {
      if (begin == end) continue;
      for (std::int64_t g = 0; g < group; ++g) {
        const Storage* weights = static_cast<const Storage*>(job.weights) + (head + g) * p.keys + key;
        const T scale = static_cast<const T*>(job.scales)[(head + g) * chunks + chunk];
        for (std::int64_t j = begin; j < end; ++j) scores[g * decode_chunk + j] = to_float(weights[j]) * scale;
      }
    } else {
      if (begin < end) {
        const Storage* keys_here = row_of<Storage>(job.k, b, kv_head, key + begin);
        for_heads<T>(group, [&](std::int64_t g, auto heads) {
          dot_rows<heads.value>(q + g * q_stride, q_stride, p.head_dim, keys_here, job.k.stride[2], end - begin,
                                scores + g * decode_chunk + begin);
        });
      }
      for (std::int64_t g = 0; g < group; ++g) {
        T* row = scores + g * decode_chunk;
        const T maximum = row_maximum(row, begin, end, factor), shift = maximum == -infinity<T> ? T(0) : maximum;
        const T sum = row_exponentials<true>(row, row, begin, end, decode_chunk, factor, shift);
        static_cast<T*>(static_cast<void*>(job.maxima))[(head + g) * chunks + chunk] = maximum;
        static_cast<T*>(static_cast<void*>(job.sums))[(head + g) * chunks + chunk] = sum;
        if (job.weights != nullptr) {
          Storage* weights = static_cast<Storage*>(job.weights) + (head + g) * p.keys + key;
          store_row(weights, row, keys, T(1));
        }
        // The running sum of the segment is in units of 2^(its maximum).
        if (maximum > maxima[g]) {
          const T correction = static_cast<T>(std::exp2(maxima[g] - maximum));
          for (std::int64_t d = 0; d < p.value_dim; ++d) sums[g * sums_stride + d] *= correction;
          maxima[g] = maximum;
        } else if (maximum < maxima[g]) {
          const T correction = static_cast<T>(std::exp2(maximum - maxima[g]));
          for (std::int64_t j = begin; j < end; ++j) row[j] *= correction;
        }
      }
    }
    if (begin < end) {
      const Storage* values_here = row_of<Storage>(job.v, b, kv_head, key + begin);
      for_heads<T>(group, [&](std::int64_t g, auto heads) {
        add_rows<heads.value>(scores + g * decode_chunk + begin, values_here, job.v.stride[2], end - begin, p.value_dim,
                              sums + g * sums_stride, sums_stride);
      });
    }
  }
  for (std::int64_t g = 0; g < group; ++g)
    std::memcpy(static_cast<T*>(static_cast<void*>(job.partial)) + ((head + g) * job.segments + segment) * p.value_dim,
                sums + g * sums_stride, p.value_dim * sizeof(T));
}

template <class E>
void combine(const DecodeJob& job, std::int64_t task) {
  using Storage = typename E::Storage;
  using T = typename E::Accumulator;
  const Problem& p = job.problem;
  const std::int64_t b = task / p.kv_heads, kv_head = task % p.kv_heads, group = p.heads / p.kv_heads;
  const std::int64_t chunks = chunks_of(p.keys);
  const KeyRange seen = visible_keys(p, b, 0);
  for (std::int64_t g = 0; g < group; ++g) {
    const std::int64_t head = b * p.heads + kv_head * group + g;
    const T* maxima = static_cast<const T*>(static_cast<void*>(job.maxima)) + head * chunks;
    const T* sums = static_cast<const T*>(static_cast<void*>(job.sums)) + head * chunks;
    T* partial = static_cast<T*>(static_cast<void*>(job.partial)) + head * job.segments * p.value_dim;
    const auto segment_maximum = [&](std::int64_t segment) {
      T m = -infinity<T>;
      for (std::int64_t c = segment * job.segment_chunks; c < least(chunks, (segment + 1) * job.segment_chunks); ++c)
        m = maxima[c] > m ? maxima[c] : m;
      return m;
    };
    T inverse = 1, maximum = 0;
    if (!job.from_probs) {
      maximum = -infinity<T>;
      for (std::int64_t c = 0; c < chunks; ++c) maximum = maxima[c] > maximum ? maxima[c] : maximum;
      T sum = 0;
      if (maximum == -infinity<T>) maximum = 0;
      for (std::int64_t c = 0; c < chunks; ++c) sum += sums[c] * static_cast<T>(std::exp2(maxima[c] - maximum));
      inverse = seen.begin < seen.end ? 1 / sum : T(0);
      if (job.scales != nullptr)
        for (std::int64_t c = 0; c < chunks; ++c)
          static_cast<T*>(job.scales)[head * chunks + c] = inverse * static_cast<T>(std::exp2(maxima[c] - maximum));
    }
    for (std::int64_t segment = 0; segment < job.segments; ++segment) {
      const T* from = partial + segment * p.value_dim;
      T factor = inverse;
      if (!job.from_probs) factor *= static_cast<T>(std::exp2(segment_maximum(segment) - maximum));
      for (std::int64_t d = 0; d < p.value_dim; ++d) partial[d] = (segment > 0 ? partial[d] : T(0)) + factor * from[d];
    }
    store_row(const_cast<Storage*>(row_of<Storage>(job.out, b, kv_head * group + g, 0)), partial, p.value_dim, T(1));
  }
}

template <class E>
struct Family {
  static constexpr DecodeKernels kernels = {segment<E>, combine<E>};
};

}  // namespace

const DecodeKernels& decode_kernels(DType dtype) {
  return choose<Family>(dtype);
}

}  // namespace effcore::attention::EFFCORE_ISA
