// What the kernels of the scan family share: blocks of channels in vectors of T, and the functions of dt and of the gates.
//
// A task loads some tokens of its block at a time into scratch memory, as T and padded to whole vectors with zeros, computes on
// those, and stores what is valid. Conversions, tails and strides are then nowhere else.
#pragma once
#include "../scan_kernels.h"
#include "../scratch.h"
#include "simd.h"

namespace effcore::scan::EFFCORE_ISA {
namespace {

namespace simd = effcore::attention::EFFCORE_ISA;
using simd::Vector, simd::width;

template <class Storage>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <class T>
constexpr int vectors = 4;  // of a block: a row's part is then a few cache lines, and one load of B[t, n] serves all
template <class T>
constexpr std::int64_t lanes = vectors<T> * width<T>;

// 2^x for any x: simd.h's keeps what is above 2^128 (2^1024) to itself where the instruction set has no scalef.
template <class T>
[[gnu::always_inline]] inline Vector<T> exp2(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return simd::exp2_nonpositive(x);
#endif
  constexpr T limit = sizeof(T) == 4 ? 128 : 1024;
  return x >= limit ? simd::broadcast(T(__builtin_inf())) : simd::exp2_nonpositive(x);
}

// 1 / (1 + e^-x), by e^-|x| so that nothing overflows
template <class T>
[[gnu::always_inline]] inline Vector<T> sigmoid(Vector<T> x) {
  const Vector<T> u = simd::exp2_nonpositive((x < 0 ? x : -x) * T(simd::log2_e)), share = T(1) / (T(1) + u);
  return x < 0 ? u * share : share;
}

// log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|, with a small relative error where u is small: dt of a trained model is.
// log1p(u) = 2 atanh(s), s = u / (2 + u) <= 1/3, whose series needs 7 terms for float and 16 for double.
template <class T>
[[gnu::always_inline]] inline Vector<T> softplus(Vector<T> x) {
  const Vector<T> u = simd::exp2_nonpositive((x < 0 ? x : -x) * T(simd::log2_e));
  const Vector<T> s = u / (T(2) + u), square = s * s;
  constexpr int terms = sizeof(T) == 4 ? 7 : 16;
  Vector<T> series = simd::broadcast(T(1) / (2 * terms + 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 0; --i) series = series * square + T(1) / (2 * i + 1);
  return (x > 0 ? x : Vector<T>{}) + T(2) * s * series;
}

// A piece of a task's scratch memory after the other, each at a cache line.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) : next_(static_cast<char*>(scratch::get(scratch::Slot::local, bytes))) {}
  template <class T>
  T* take(std::int64_t n) {
    T* const p = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(n);
    return p;
  }
  template <class T>
  static constexpr std::int64_t bytes(std::int64_t n) {
    return simd::round_up(n * sizeof(T), scratch::alignment);
  }

 private:
  char* next_;
};

// Element [i, j, first channel] of a tensor of rows.
template <class Storage>
Storage* at(const TensorView& t, std::int64_t i, std::int64_t j, std::int64_t channel) {
  return static_cast<Storage*>(t.data) + i * t.stride[0] + j * t.stride[1] + channel;
}

// to[rows][pitch] from `n` channels of as many tokens, and back
template <class T, class Storage>
void load_tokens(T* to, std::int64_t pitch, const Storage* from, std::int64_t stride, std::int64_t rows, std::int64_t n) {
  for (std::int64_t r = 0; r < rows; ++r) simd::load_row(to + r * pitch, from + r * stride, n, pitch);
}
template <class T, class Storage>
void store_tokens(Storage* to, std::int64_t stride, const T* from, std::int64_t pitch, std::int64_t rows, std::int64_t n) {
  for (std::int64_t r = 0; r < rows; ++r) simd::store_row(to + r * stride, from + r * pitch, n, T{1});
}

// to[j][c] = factor * parameter[first + c][j], or parameter[first + c] of a vector; zeros in the padding and where it is null.
// A parameter is in the tensors' dtype or in float.
template <class T, class Source>
void load_columns(T* to, const TensorView& p, std::int64_t first, std::int64_t n, T factor) {
  const std::int64_t columns = p.rank == 2 ? p.size[1] : 1;
  const auto* from = static_cast<const Source*>(p.data) + first * p.stride[0];
  for (std::int64_t c = 0; c < n; ++c, from += p.stride[0])
    for (std::int64_t j = 0; j < columns; ++j) to[j * lanes<T> + c] = simd::to_float(from[j]) * factor;
}
template <class T, class Storage>
void load_parameter(T* to, const TensorView* p, std::int64_t first, std::int64_t n, T factor = 1) {
  simd::zero(to, (p != nullptr && p->rank == 2 ? p->size[1] : 1) * lanes<T>);
  if (p == nullptr) return;
  if (p->dtype == DType::float32)
    load_columns<T, float>(to, *p, first, n, factor);
  else
    load_columns<T, Storage>(to, *p, first, n, factor);
}

// state[N][lanes] to and from [channels, N] in memory
template <class T>
void load_state(T* state, const T* from, std::int64_t n, std::int64_t states) {
  simd::zero(state, states * lanes<T>);
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t j = 0; j < states; ++j) state[j * lanes<T> + c] = from[c * states + j];
}
template <class T>
void store_state(T* to, const T* state, std::int64_t n, std::int64_t states) {
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t j = 0; j < states; ++j) to[c * states + j] = state[j * lanes<T> + c];
}

}  // namespace
}  // namespace effcore::scan::EFFCORE_ISA
