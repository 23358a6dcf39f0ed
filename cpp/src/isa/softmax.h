// The elementwise half of attention, on rows of a block of scores.
//
// Scores are kept as they come from the product; `factor` = scale * log2(e) joins them in the exponent, so that one fused
// multiply-add and 2^x do the work of scale, subtraction and exp. Rows are cut to what they see: everything outside is
// written as 0 and never enters a maximum or a sum, so that no -inf arithmetic takes place.
#pragma once
#include "simd.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

template <class T>
constexpr T infinity = static_cast<T>(__builtin_inf());

// Puts x before `begin` in its vector and from `end` to the end of its vector, so that whole vectors can be read.
template <class T>
inline void pad_row(T* row, std::int64_t begin, std::int64_t end, T x) {
  for (std::int64_t j = begin / width<T> * width<T>; j < begin; ++j) row[j] = x;
  for (std::int64_t j = end; j < round_up(end, width<T>); ++j) row[j] = x;
}

// max over [begin, end) of factor * row
template <class T>
inline T row_maximum(const T* row, std::int64_t begin, std::int64_t end, T factor) {
  Vector<T> m0 = broadcast(-infinity<T>), m1 = m0;
  std::int64_t j = begin;
  for (; j + 2 * width<T> <= end; j += 2 * width<T>) {
    m0 = larger(m0, load(row + j) * factor);
    m1 = larger(m1, load(row + j + width<T>) * factor);
  }
  T m = horizontal_max<T>(larger(m0, m1));
  for (; j < end; ++j) m = row[j] * factor > m ? row[j] * factor : m;
  return m;
}

// row = 2^(factor * row - shift) in [begin, end), 0 elsewhere in [0, padded); returns the sum
template <class T>
inline T row_exponentials(T* row, std::int64_t begin, std::int64_t end, std::int64_t padded, T factor, T shift) {
  if (begin >= end) {
    fill(row, padded, T(0));
    return T(0);
  }
  const std::int64_t first = begin / width<T> * width<T>, last = round_up(end, width<T>);
  Vector<T> s0{}, s1{};
  fill(row, first, T(0));
  std::int64_t j = first;
  const auto at = [&](std::int64_t position) { return exp2_nonpositive(load(row + position) * factor - shift); };
  pad_row(row, begin, end, T(0));
  if (begin > first || end < last) {
    // Ends that are cut: computed on finite numbers, then set to 0.
    for (j = first; j < last; j += width<T>) store(row + j, at(j));
    pad_row(row, begin, end, T(0));
    for (j = first; j < last; j += width<T>) s0 += load(row + j);
  } else {
    for (; j + 2 * width<T> <= last; j += 2 * width<T>) {
      const Vector<T> p0 = at(j), p1 = at(j + width<T>);
      store(row + j, p0);
      store(row + j + width<T>, p1);
      s0 += p0;
      s1 += p1;
    }
    for (; j < last; j += width<T>) {
      const Vector<T> p = at(j);
      store(row + j, p);
      s0 += p;
    }
  }
  fill(row + last, padded - last, T(0));
  return horizontal_sum<T>(s0 + s1);
}

// dS = P * (dP - delta) in [begin, end), 0 elsewhere in [0, padded)
template <class T>
inline void row_score_gradients(T* ds, const T* p, std::int64_t begin, std::int64_t end, std::int64_t padded, T delta) {
  const std::int64_t first = begin / width<T> * width<T>, last = begin < end ? round_up(end, width<T>) : first;
  fill(ds, first, T(0));
  for (std::int64_t j = first; j < last; j += width<T>) store(ds + j, load(p + j) * (load(ds + j) - delta));
  if (begin < end) pad_row(ds, begin, end, T(0));
  fill(ds + last, padded - last, T(0));
}

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
