// The elementwise half of attention, on rows of a block of scores.
//
// Scores are kept as they come from the product; `factor` = scale * log2(e) joins them in the exponent, so that one fused
// multiply-add and 2^x do the work of scale, subtraction and exp. Rows are cut to what they see, [begin, end): everything
// else is written as 0 and never enters a maximum or a sum, so that no -inf arithmetic takes place.
#pragma once
#include "simd.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

template <class T>
constexpr T infinity = static_cast<T>(__builtin_inf());

// x in the lanes of positions [begin, end), y in the others; the vector stands at position j.
template <class T>
[[gnu::always_inline]] inline Vector<T> cut(Vector<T> x, T y, std::int64_t j, std::int64_t begin, std::int64_t end) {
  using Lane = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
  Vector<Lane> lane;
  for (int i = 0; i < width<T>; ++i) lane[i] = i;
  lane += static_cast<Lane>(j);
  return (lane >= static_cast<Lane>(begin)) & (lane < static_cast<Lane>(end)) ? x : broadcast(y);
}

// Calls at(j, whole) for each vector of [begin, end): `whole` is false where the row is cut within the vector.
template <class T, class At>
[[gnu::always_inline]] inline void for_vectors(std::int64_t begin, std::int64_t end, const At& at) {
  std::int64_t j = begin / width<T> * width<T>;
  if (j < begin && j < end) {
    at(j, false);
    j += width<T>;
  }
  for (; j + width<T> <= end; j += width<T>) at(j, true);
  if (j < end) at(j, false);
}

// max over [begin, end) of factor * row
template <class T>
inline T row_maximum(const T* row, std::int64_t begin, std::int64_t end, T factor) {
  Vector<T> m = broadcast(-infinity<T>), other = m;
  for_vectors<T>(begin, end, [&](std::int64_t j, bool whole) {
    const Vector<T> x = load(row + j) * factor;
    m = larger(whole ? x : cut(x, -infinity<T>, j, begin, end), m);
    const Vector<T> swap = m;  // two chains of maxima in turn: one would wait for its own latency
    m = other;
    other = swap;
  });
  return horizontal_max<T>(larger(m, other));
}

// to = 2^(factor * row - shift) in [begin, end), 0 elsewhere in [0, padded); returns the sum. With `in_place` the row holds
// the same afterwards (the operand of a product may be rounded, gradients want it as it is).
template <bool in_place, class T, class Operand>
inline T row_exponentials(T* row, Operand* to, std::int64_t begin, std::int64_t end, std::int64_t padded, T factor, T shift) {
  const std::int64_t first = begin < end ? begin / width<T> * width<T> : 0, last = begin < end ? round_up(end, width<T>) : 0;
  Vector<T> sum{};
  for_vectors<T>(begin, end, [&](std::int64_t j, bool whole) {
    Vector<T> p = exp2_nonpositive(load(row + j) * factor - shift);
    if (!whole) p = cut(p, T(0), j, begin, end);
    if constexpr (in_place) store(row + j, p);
    if constexpr (!in_place || !std::is_same_v<T, Operand>) store_as(to + j, p);
    sum += p;
  });
  const auto clear = [&](auto* p) {
    zero(p, first);
    zero(p + last, padded - last);
  };
  if constexpr (in_place) clear(row);
  if constexpr (!in_place || !std::is_same_v<T, Operand>) clear(to);
  return horizontal_sum<T>(sum);
}

// ds = P * (dP - delta) in [begin, end), 0 elsewhere in [0, padded)
template <class T, class Operand>
inline void row_score_gradients(const T* dp, const T* p, Operand* ds, std::int64_t begin, std::int64_t end, std::int64_t padded,
                                T delta) {
  const std::int64_t first = begin < end ? begin / width<T> * width<T> : 0, last = begin < end ? round_up(end, width<T>) : 0;
  for_vectors<T>(begin, end, [&](std::int64_t j, bool whole) {
    const Vector<T> x = load(p + j) * (load(dp + j) - delta);
    store_as(ds + j, whole ? x : cut(x, T(0), j, begin, end));
  });
  zero(ds, first);
  zero(ds + last, padded - last);
}

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
