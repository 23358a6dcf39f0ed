// Arithmetic on rows of tokens: sums, the class token's softmax row, normalization and its gradient.
//
// Bound: memory. Each row is read once into registers or into a row of scratch memory that stays in the first-level cache.
#include "../routing_kernels.h"
#include "routing_select.h"
#include "simd.h"

namespace effcore::routing::EFFCORE_ISA {
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

// Sums in four chains: one would wait for each addition.
template <class T, class Term, class Last>
T sum_of(std::int64_t n, const Term& vector, const Last& scalar) {
  Vector<T> sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * width<T> <= n; i += 4 * width<T>)
    for (int j = 0; j < 4; ++j) sums[j] += vector(i + j * width<T>);
  for (; i + width<T> <= n; i += width<T>) sums[0] += vector(i);
  T sum = simd::horizontal_sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += scalar(i);
  return sum;
}

template <class T>
T total(const T* x, std::int64_t n) {
  return sum_of<T>(n, [=](std::int64_t i) { return simd::load(x + i); }, [=](std::int64_t i) { return x[i]; });
}

// sum of (x - shift) * (y - shift)
template <class T>
T dot(const T* x, const T* y, std::int64_t n, T shift) {
  const Vector<T> shifts = simd::broadcast(shift);
  return sum_of<T>(
      n, [=](std::int64_t i) { return (simd::load(x + i) - shifts) * (simd::load(y + i) - shifts); },
      [=](std::int64_t i) { return (x[i] - shift) * (y[i] - shift); });
}

template <class T>
T square_root(T x) {
  if constexpr (sizeof(T) == 8)
    return __builtin_sqrt(x);
  else
    return __builtin_sqrtf(x);
}

template <class Storage>
struct Rows {
  using T = typename SumOf<Storage>::type;

  static void load(void* to, const void* from, std::int64_t n) {
    simd::load_row(static_cast<T*>(to), static_cast<const Storage*>(from), n, n);
  }
  static void store(void* to, const void* sums, std::int64_t n) {
    simd::store_row(static_cast<Storage*>(to), static_cast<const T*>(sums), n, T{1});
  }

  static void add(void* sums_, const void* row_, std::int64_t n) {
    auto* sums = static_cast<T*>(sums_);
    const auto* row = static_cast<const Storage*>(row_);
    std::int64_t i = 0;
    for (; i + width<T> <= n; i += width<T>) simd::store(sums + i, simd::load(sums + i) + simd::load_as(row + i, T{}));
    for (; i < n; ++i) sums[i] += simd::to_float(row[i]);
  }

  static void sum(void* out_, const void* a_, const void* b_, const void* c_, std::int64_t n) {
    auto* out = static_cast<Storage*>(out_);
    const auto *a = static_cast<const Storage*>(a_), *b = static_cast<const Storage*>(b_), *c = static_cast<const Storage*>(c_);
    std::int64_t i = 0;
    for (; i + width<T> <= n; i += width<T>) {
      Vector<T> x = simd::load_as(a + i, T{}) + simd::load_as(b + i, T{});
      if (c != nullptr) x += simd::load_as(c + i, T{});
      simd::store_as(out + i, x);
    }
    for (; i < n; ++i) {
      T x = simd::to_float(a[i]) + simd::to_float(b[i]);
      if (c != nullptr) x += simd::to_float(c[i]);
      out[i] = simd::from_float<Storage, T>(x);
    }
  }

  static T product(const T* q, const Storage* k, std::int64_t dim) {
    Vector<T> sums[2] = {};
    std::int64_t i = 0;
    for (; i + 2 * width<T> <= dim; i += 2 * width<T>) {
      sums[0] += simd::load(q + i) * simd::load_as(k + i, T{});
      sums[1] += simd::load(q + i + width<T>) * simd::load_as(k + i + width<T>, T{});
    }
    for (; i + width<T> <= dim; i += width<T>) sums[0] += simd::load(q + i) * simd::load_as(k + i, T{});
    T x = simd::horizontal_sum<T>(sums[0] + sums[1]);
    for (; i < dim; ++i) x += q[i] * simd::to_float(k[i]);
    return x;
  }

  // `q` is [dim] of T. Scores are in base 2; NaN spreads over the row, as in torch.
  static void score(void* probs_, void* scores_, const void* q_, const void* k_, std::int64_t k_stride, std::int64_t tokens,
                    std::int64_t dim, double scale, double weight) {
    auto *probs = static_cast<T*>(probs_), *scores = static_cast<T*>(scores_);
    const auto* q = static_cast<const T*>(q_);
    const auto* k = static_cast<const Storage*>(k_);
    const T factor = static_cast<T>(scale * simd::log2_e);
    T top = -__builtin_inf();
    bool valid = true;
    for (std::int64_t n = 0; n < tokens; ++n) {
      const T x = scores[n] = factor * product(q, k + n * k_stride, dim);
      top = x > top ? x : top;
      valid = valid && x == x;
    }
    if (!valid) top = __builtin_nan("");
    T sum = 0;
    for (std::int64_t n = 0; n < tokens; n += width<T>) {
      Vector<T> x = simd::broadcast(T(-__builtin_inf()));
      const std::int64_t some = simd::least(width<T>, tokens - n);
      if (some == width<T>)
        x = simd::load(scores + n);
      else
        for (std::int64_t i = 0; i < some; ++i) x[i] = scores[n + i];
      x = simd::exp2_nonpositive(x - simd::broadcast(top));
      sum += simd::horizontal_sum<T>(x);
      if (some == width<T>)
        simd::store(scores + n, x);
      else
        for (std::int64_t i = 0; i < some; ++i) scores[n + i] = x[i];
    }
    const T share = static_cast<T>(weight) / sum;
    for (std::int64_t n = 0; n < tokens; ++n) probs[n] += scores[n] * share;
  }

  static void norm(void* normed_, const void* x_, const void* weight_, const void* bias_, std::int64_t n, double eps, bool rms,
                   void* mean_, void* rstd_) {
    auto* normed = static_cast<Storage*>(normed_);
    const auto *x = static_cast<const T*>(x_), *weight = static_cast<const T*>(weight_), *bias = static_cast<const T*>(bias_);
    const T mean = rms ? T{0} : total(x, n) / n;
    const T rstd = 1 / square_root(dot(x, x, n, mean) / n + static_cast<T>(eps));
    if (mean_ != nullptr) *static_cast<T*>(mean_) = mean;
    *static_cast<T*>(rstd_) = rstd;
    std::int64_t i = 0;
    const Vector<T> means = simd::broadcast(mean), rstds = simd::broadcast(rstd);
    for (; i + width<T> <= n; i += width<T>) {
      Vector<T> y = (simd::load(x + i) - means) * rstds * simd::load(weight + i);
      if (bias != nullptr) y += simd::load(bias + i);
      simd::store_as(normed + i, y);
    }
    for (; i < n; ++i) {
      T y = (x[i] - mean) * rstd * weight[i];
      if (bias != nullptr) y += bias[i];
      normed[i] = simd::from_float<Storage, T>(y);
    }
  }

  static void norm_backward(void* sums_, const void* x_, const void* dnormed_, const void* weight_, std::int64_t n, bool rms,
                            const void* mean_, const void* rstd_, void* dweight_, void* dbias_, void* g_, void* xhat_) {
    auto *sums = static_cast<T*>(sums_), *dweight = static_cast<T*>(dweight_), *dbias = static_cast<T*>(dbias_);
    auto *g = static_cast<T*>(g_), *xhat = static_cast<T*>(xhat_);
    const auto* weight = static_cast<const T*>(weight_);
    const T mean = rms ? T{0} : *static_cast<const T*>(mean_), rstd = *static_cast<const T*>(rstd_);
    load(xhat, x_, n);
    load(g, dnormed_, n);
    for (std::int64_t i = 0; i < n; ++i) {
      xhat[i] = (xhat[i] - mean) * rstd;
      dweight[i] += g[i] * xhat[i];
      if (dbias != nullptr) dbias[i] += g[i];
      g[i] *= weight[i];
    }
    const T along = dot(g, xhat, n, T{0}) / n, level = rms ? T{0} : total(g, n) / n;
    for (std::int64_t i = 0; i < n; ++i) sums[i] += rstd * (g[i] - level - xhat[i] * along);
  }

  static constexpr RowKernels table = {load, store, add, sum, score, Selection<T>::run, norm, norm_backward};
};

}  // namespace

const RowKernels& row_kernels(DType dtype) {
  switch (dtype) {
    case DType::float64: return Rows<double>::table;
    case DType::bfloat16: return Rows<simd::bfloat16>::table;
    case DType::float16: return Rows<simd::float16>::table;
    default: return Rows<float>::table;
  }
}

}  // namespace effcore::routing::EFFCORE_ISA
