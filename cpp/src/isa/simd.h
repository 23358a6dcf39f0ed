// Vectors of this unit's instruction set, in GCC vector extensions: loads, conversions from and to the tensors' dtypes, 2^x.
//
// Included by the units of this folder only. Everything is in an anonymous namespace: were two instruction sets to share a
// function with external linkage, the linker would keep one of them, and the portable code might end up with AVX-512.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12: its own _mm512_undefined_*
#include <immintrin.h>
#endif

#include "../attention_kernels.h"

#ifndef EFFCORE_ISA
#error "compile the units of this folder with -DEFFCORE_ISA=v2, v3, v4, bf16 or amx"
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments of functions that are all inlined

namespace effcore::attention::EFFCORE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type [[gnu::vector_size(vector_bytes)]];
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int width = vector_bytes / sizeof(T);

template <class T>
[[gnu::always_inline]] inline Vector<T> load(const T* p) {
  Vector<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
[[gnu::always_inline]] inline void store(T* p, Vector<T> x) {
  std::memcpy(p, &x, sizeof x);
}
// Past the caches, where a vector is a whole line of them: the line is then not read before it is written. Other threads see it
// after a fence.
template <class T>
[[gnu::always_inline]] inline void stream(T* p, Vector<T> x) {
#if defined(__AVX512F__)
  if (reinterpret_cast<std::uintptr_t>(p) % vector_bytes == 0)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#endif
  store(p, x);
}
[[gnu::always_inline]] inline void stream_fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
template <class T>
[[gnu::always_inline]] inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// 16-bit formats, held as their bits.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

inline float to_float(float x) {
  return x;
}
inline double to_float(double x) {
  return x;
}
inline float to_float(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float to_float(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  std::uint32_t bits;
  float y;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else {
    // Shifted into place, the exponent is 112 too small; the product is exact, for subnormal numbers too.
    bits = magnitude << 13;
    std::memcpy(&y, &bits, sizeof y);
    y *= 0x1p112f;
    std::memcpy(&bits, &y, sizeof y);
    bits |= sign;
  }
  std::memcpy(&y, &bits, sizeof y);
  return y;
#endif
}

template <class Storage, class T>
inline Storage from_float(T x);
template <>
inline float from_float<float, float>(float x) {
  return x;
}
template <>
inline double from_float<double, double>(double x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16, float>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  if (x != x) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline float16 from_float<float16, float>(float x) {
#if defined(__F16C__)
  return {static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u | (bits >> 13 & 0x3ffu))};
  if (bits >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // subnormal: let an addition round at 2^-24
    float y;
    std::memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    std::memcpy(&bits, &y, sizeof y);
    return {static_cast<std::uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return {static_cast<std::uint16_t>(sign | ((bits >> 13) - (112u << 10)))};
#endif
}

// A vector of numbers in the dtype of a tensor, as floats.
[[gnu::always_inline]] inline Vector<float> load_as(const float* p, float) {
  return load(p);
}
[[gnu::always_inline]] inline Vector<double> load_as(const double* p, double) {
  return load(p);
}
[[gnu::always_inline]] inline Vector<float> load_as(const bfloat16* p, float) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vector<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
  Vector<float> x;
  for (int i = 0; i < width<float>; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}
[[gnu::always_inline]] inline Vector<float> load_as(const float16* p, float) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vector<float> x;
  for (int i = 0; i < width<float>; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

[[gnu::always_inline]] inline void store_as(float* p, Vector<float> x) {
  store(p, x);
}
[[gnu::always_inline]] inline void store_as(double* p, Vector<double> x) {
  store(p, x);
}
[[gnu::always_inline]] inline void store_as(bfloat16* p, Vector<float> x) {
  typedef std::uint32_t Bits [[gnu::vector_size(vector_bytes)]];
  Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  bits = x == x ? rounded : quiet;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
  for (int i = 0; i < width<float>; ++i) p[i].bits = static_cast<std::uint16_t>(bits[i]);
#endif
}
[[gnu::always_inline]] inline void store_as(float16* p, Vector<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < width<float>; ++i) p[i] = from_float<float16, float>(x[i]);
#endif
}

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr std::int64_t least(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
constexpr std::int64_t most(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}

// to[0, n) = from, to[n, padded) = 0
template <class T, class Storage>
inline void load_row(T* to, const Storage* from, std::int64_t n, std::int64_t padded) {
  const std::int64_t whole = n / width<T> * width<T>;
  for (std::int64_t i = 0; i < whole; i += width<T>) store(to + i, load_as(from + i, T{}));
  for (std::int64_t i = whole; i < n; ++i) to[i] = to_float(from[i]);
  for (std::int64_t i = n; i < padded; ++i) to[i] = 0;
}

// to[0, n) = from * factor
template <class T, class Storage>
inline void store_row(Storage* to, const T* from, std::int64_t n, T factor) {
  const std::int64_t whole = n / width<T> * width<T>;
  for (std::int64_t i = 0; i < whole; i += width<T>) store_as(to + i, load(from + i) * factor);
  for (std::int64_t i = whole; i < n; ++i) to[i] = from_float<Storage, T>(from[i] * factor);
}

inline void load_row(bfloat16* to, const bfloat16* from, std::int64_t n, std::int64_t padded) {
  std::memcpy(to, from, n * sizeof *to);
  std::memset(to + n, 0, (padded - n) * sizeof *to);
}

template <class T>
inline void fill(T* p, std::int64_t n, T x) {
  for (const T* end = p + n; p < end; ++p) *p = x;
}
template <class T>
inline void zero(T* p, std::int64_t n) {
  if (n > 0) std::memset(static_cast<void*>(p), 0, n * sizeof(T));
}

[[gnu::always_inline]] inline Vector<float> larger(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline Vector<double> larger(Vector<double> a, Vector<double> b) {
  return a > b ? a : b;
}

template <class T>
inline T horizontal_max(Vector<T> x) {
  T m = x[0];
  for (int i = 1; i < width<T>; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
// x[i] + x[i ^ apart] in each lane
template <int apart, class T, int... lane>
[[gnu::always_inline]] inline Vector<T> add_lanes(Vector<T> x, std::integer_sequence<int, lane...>) {
  return x + __builtin_shufflevector(x, x, (lane ^ apart)...);
}
// By shuffles of whole vectors: a loop over lanes goes through memory.
template <class T, int apart = width<T> / 2>
[[gnu::always_inline]] inline T horizontal_sum(Vector<T> x) {
  if constexpr (apart == 0)
    return x[0];
  else
    return horizontal_sum<T, apart / 2>(add_lanes<apart, T>(x, std::make_integer_sequence<int, width<T>>()));
}

// 2^x for x <= 0 or barely above: 0 for -inf, NaN for NaN; results below 2^-126 may come out as 0. With base 2 the reduction
// x = n + r, |r| <= 1/2, is exact; the polynomial is minimax with a relative error below 1e-7 and 2^0 = 1 exactly.
[[gnu::always_inline]] inline Vector<float> exp2_nonpositive(Vector<float> x) {
#if defined(__AVX512F__)
  // vreduceps and vscalefps take infinities and NaN as they should; 2.1 ns for 16 numbers against 2.8 for the bits below.
  const Vector<float> r = reinterpret_cast<Vector<float>>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0x08)), n = x - r;
#else
  typedef std::uint32_t Bits [[gnu::vector_size(vector_bytes)]];
  constexpr float magic = 0x1.8p23f;
  const Vector<float> n = x + magic, r = x - (n - magic);
#endif
  Vector<float> p = broadcast(1.3264727065527462e-3f);
  p = p * r + 9.671512648929289e-3f;
  p = p * r + 5.550733743690431e-2f;
  p = p * r + 2.4022242085172826e-1f;
  p = p * r + 6.931469775988585e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  p = reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(n) << 23));
  return x < -126.0f ? Vector<float>{} : x == x ? p : x;
#endif
}
[[gnu::always_inline]] inline Vector<double> exp2_nonpositive(Vector<double> x) {
  typedef std::uint64_t Bits [[gnu::vector_size(vector_bytes)]];
  constexpr double magic = 0x1.8p52, ln2 = 0.693147180559945309417;
  const Vector<double> shifted = x + magic, r = (x - (shifted - magic)) * ln2;
  constexpr double inverse_factorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  Vector<double> p = broadcast(inverse_factorial[13]);
  for (int i = 12; i >= 0; --i) p = p * r + inverse_factorial[i];
  p = reinterpret_cast<Vector<double>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 52));
  return x < -1022.0 ? Vector<double>{} : x == x ? p : x;
}

// The two ways in which a pair of vectors change the squares of `half` x `half` numbers that are off the diagonal.
template <class T, int half>
struct Exchange {
  using Index = typename VectorOf<std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>>::type;
  [[gnu::always_inline]] static Vector<T> upper(Vector<T> a, Vector<T> b) {
    Index index{};
    for (int j = 0; j < width<T>; ++j) index[j] = j & half ? width<T> + j - half : j;
    return __builtin_shuffle(a, b, index);
  }
  [[gnu::always_inline]] static Vector<T> lower(Vector<T> a, Vector<T> b) {
    Index index{};
    for (int j = 0; j < width<T>; ++j) index[j] = j & half ? width<T> + j : j + half;
    return __builtin_shuffle(a, b, index);
  }
};

// x[i][j] and x[j][i] change places: squares of half the width first, then of a quarter, down to single elements.
template <class T, int half = width<T> / 2>
[[gnu::always_inline]] inline void transpose(Vector<T>* x) {
#pragma GCC unroll 16
  for (int i = 0; i < width<T>; ++i) {
    if (i & half) continue;
    const Vector<T> a = x[i], b = x[i + half];
    x[i] = Exchange<T, half>::upper(a, b);
    x[i + half] = Exchange<T, half>::lower(a, b);
  }
  if constexpr (half > 1) transpose<T, half / 2>(x);
}

// Lane i is the sum of x[i]: the same exchange, adding instead of keeping both.
template <class T, int half = width<T> / 2>
[[gnu::always_inline]] inline Vector<T> sum_across(Vector<T>* x) {
#pragma GCC unroll 16
  for (int i = 0; i < half; ++i) {
    const Vector<T> a = x[i], b = x[i + half];
    x[i] = Exchange<T, half>::upper(a, b) + Exchange<T, half>::lower(a, b);
  }
  if constexpr (half > 1) return sum_across<T, half / 2>(x);
  return x[0];
}

constexpr double log2_e = 1.44269504088896340736;
constexpr double ln_2 = 0.693147180559945309417;

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
