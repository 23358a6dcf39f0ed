// The core's attention alone, without torch or Python: every function against sums written out in double precision.
#include "effcore/attention.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "effcore/error.h"
#include "test.h"

using namespace effcore;
using namespace effcore::attention;

namespace {

using test::expect, test::three_threads;

// ---- tensors ---------------------------------------------------------------------------------------------------------

std::size_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

double half_to_double(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// A dense tensor [b, h, tokens, dim] with room between rows, poisoned with NaN where nobody writes.
struct Tensor {
  std::vector<char> memory;
  TensorView view;

  Tensor() = default;
  Tensor(DType dtype, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d, int gap = 0, bool heads_inside = false) {
    view.dtype = dtype;
    view.device = DeviceKind::cpu;
    view.rank = 4;
    const std::int64_t size[4] = {b, h, t, d};
    std::copy(size, size + 4, view.size);
    const std::int64_t row = d + gap;
    view.stride[0] = h * t * row;
    view.stride[1] = heads_inside ? row : t * row;
    view.stride[2] = heads_inside ? h * row : row;
    view.stride[3] = 1;
    memory.assign((b * h * t * row + 1) * bytes_of(dtype), '\xff');
    view.data = memory.data();
  }
  std::size_t at(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) const {
    return b * view.stride[0] + h * view.stride[1] + t * view.stride[2] + d;
  }
  double get(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) const { return read(at(b, h, t, d)); }
  double read(std::size_t i) const {
    const char* p = memory.data() + i * bytes_of(view.dtype);
    if (view.dtype == DType::float64) return *reinterpret_cast<const double*>(p);
    if (view.dtype == DType::float32) return *reinterpret_cast<const float*>(p);
    std::uint16_t bits;
    std::memcpy(&bits, p, 2);
    if (view.dtype == DType::float16) return half_to_double(bits);
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  // Multiples of 1/64 within [-2, 2]: exact in every dtype, so that the reference sees the same inputs.
  void randomize(std::mt19937& random) {
    for (std::int64_t b = 0; b < view.size[0]; ++b)
      for (std::int64_t h = 0; h < view.size[1]; ++h)
        for (std::int64_t t = 0; t < view.size[2]; ++t)
          for (std::int64_t d = 0; d < view.size[3]; ++d) set(b, h, t, d, (static_cast<int>(random() % 257) - 128) / 64.0);
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d, double value) {
    char* p = memory.data() + at(b, h, t, d) * bytes_of(view.dtype);
    const float x = static_cast<float>(value);
    if (view.dtype == DType::float64) std::memcpy(p, &value, 8);
    if (view.dtype == DType::float32) std::memcpy(p, &x, 4);
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (view.dtype == DType::float16) {
      half = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
      if (x != x)
        half = 0x7e00;
      else if (x != 0)
        half = static_cast<std::uint16_t>(half | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023));
    }
    if (bytes_of(view.dtype) == 2) std::memcpy(p, &half, 2);
  }
};

// ---- reference -------------------------------------------------------------------------------------------------------

struct Case {
  DType dtype;
  std::int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  bool causal;
  bool ragged;  // lengths and first_key
  int layers;
  int gap;
};

std::string text(const Case& c) {
  char buffer[200];
  std::snprintf(buffer, sizeof buffer, "%s B%d H%d/%d Sq%d Sk%d D%d Dv%d%s%s layers %d", name(c.dtype), int(c.batch),
                int(c.heads), int(c.kv_heads), int(c.queries), int(c.keys), int(c.head_dim), int(c.value_dim),
                c.causal ? " causal" : "", c.ragged ? " ragged" : "", c.layers);
  return buffer;
}

double tolerance(DType dtype) {
  return dtype == DType::float64 ? 1e-12 : dtype == DType::float32 ? 2e-5 : dtype == DType::float16 ? 4e-3 : 3e-2;
}

using Matrix = std::vector<double>;

// P [B, H, Sq, Sk] and lse [B, H, Sq]
void reference_probs(const Problem& p, const Tensor& q, const Tensor& k, Matrix& probs, Matrix& lse) {
  probs.assign(p.batch * p.heads * p.queries * p.keys, 0.0);
  lse.assign(p.batch * p.heads * p.queries, -INFINITY);
  for (std::int64_t b = 0, row = 0; b < p.batch; ++b)
    for (std::int64_t h = 0; h < p.heads; ++h)
      for (std::int64_t i = 0; i < p.queries; ++i, ++row) {
        const std::int64_t length = p.lengths ? p.lengths[b] : p.keys, kv = h / (p.heads / p.kv_heads);
        const std::int64_t begin = p.first_key ? p.first_key[b * p.first_key_stride[0] + i * p.first_key_stride[1]] : 0;
        const std::int64_t end = p.causal ? std::min(length, length - p.queries + i + 1) : length;
        double* s = probs.data() + row * p.keys;
        double maximum = -INFINITY, sum = 0;
        for (std::int64_t j = begin; j < end; ++j) {
          for (std::int64_t d = 0; d < p.head_dim; ++d) s[j] += q.get(b, h, i, d) * k.get(b, kv, j, d);
          s[j] *= p.scale;
          maximum = std::max(maximum, s[j]);
        }
        for (std::int64_t j = begin; j < end; ++j) sum += s[j] = std::exp(s[j] - maximum);
        for (std::int64_t j = begin; j < end; ++j) s[j] /= sum;
        if (begin < end) lse[row] = maximum + std::log(sum);
      }
}

// What a comparison collects: the largest difference, relative to the largest number expected (at least 1).
struct Difference {
  double largest = 0, scale = 1;
  void add(double got, double wanted) {
    if (wanted == got) return;
    const double d = std::fabs(got - wanted);
    largest = d == d ? std::max(largest, d) : INFINITY;
    scale = std::max(scale, std::fabs(wanted));
  }
  void expect_below(double limit, const Case& c, const char* what) const {
    expect(largest <= limit * scale, text(c) + ": " + what + " off by " + std::to_string(largest / scale));
  }
};

void compare(const Tensor& got, const Matrix& wanted, const Case& c, const char* what) {
  Difference difference;
  std::size_t n = 0;
  for (std::int64_t b = 0; b < got.view.size[0]; ++b)
    for (std::int64_t h = 0; h < got.view.size[1]; ++h)
      for (std::int64_t t = 0; t < got.view.size[2]; ++t)
        for (std::int64_t d = 0; d < got.view.size[3]; ++d) difference.add(got.get(b, h, t, d), wanted[n++]);
  difference.expect_below(tolerance(c.dtype), c, what);
}

// out[b, h, i] = sum over j of P v
Matrix reference_out(const Problem& p, const Matrix& probs, const Tensor& v) {
  Matrix out(p.batch * p.heads * p.queries * p.value_dim);
  for (std::int64_t row = 0; row < p.batch * p.heads * p.queries; ++row) {
    const std::int64_t h = row / p.queries % p.heads, b = row / p.queries / p.heads, kv = h / (p.heads / p.kv_heads);
    for (std::int64_t j = 0; j < p.keys; ++j)
      if (const double w = probs[row * p.keys + j]; w != 0)
        for (std::int64_t d = 0; d < p.value_dim; ++d) out[row * p.value_dim + d] += w * v.get(b, kv, j, d);
  }
  return out;
}

struct Gradients {
  Matrix dq, dk;
  std::vector<Matrix> dv, delta;
};

Gradients reference_gradients(const Problem& p, const Matrix& probs, const Tensor& q, const Tensor& k,
                              const std::vector<Tensor>& v, const std::vector<Tensor>& dout) {
  const std::size_t layers = v.size();
  Gradients g;
  g.dq.resize(p.batch * p.heads * p.queries * p.head_dim);
  g.dk.resize(p.batch * p.kv_heads * p.keys * p.head_dim);
  g.dv.assign(layers, Matrix(p.batch * p.kv_heads * p.keys * p.value_dim));
  std::vector<Matrix> out;
  for (std::size_t l = 0; l < layers; ++l) out.push_back(reference_out(p, probs, v[l]));
  g.delta.assign(layers, Matrix(p.batch * p.heads * p.queries));
  for (std::int64_t row = 0; row < p.batch * p.heads * p.queries; ++row) {
    const std::int64_t i = row % p.queries, h = row / p.queries % p.heads, b = row / p.queries / p.heads;
    const std::int64_t kv = h / (p.heads / p.kv_heads);
    double delta = 0;
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::int64_t d = 0; d < p.value_dim; ++d) g.delta[l][row] += dout[l].get(b, h, i, d) * out[l][row * p.value_dim + d];
      delta += g.delta[l][row];
    }
    for (std::int64_t j = 0; j < p.keys; ++j) {
      const double w = probs[row * p.keys + j];
      if (w == 0) continue;
      const std::int64_t key = (b * p.kv_heads + kv) * p.keys + j;
      double dp = 0;
      for (std::size_t l = 0; l < layers; ++l)
        for (std::int64_t d = 0; d < p.value_dim; ++d) {
          dp += dout[l].get(b, h, i, d) * v[l].get(b, kv, j, d);
          g.dv[l][key * p.value_dim + d] += w * dout[l].get(b, h, i, d);
        }
      const double ds = p.scale * w * (dp - delta);
      for (std::int64_t d = 0; d < p.head_dim; ++d) {
        g.dq[row * p.head_dim + d] += ds * k.get(b, kv, j, d);
        g.dk[key * p.head_dim + d] += ds * q.get(b, h, i, d);
      }
    }
  }
  return g;
}

// ---- tests -----------------------------------------------------------------------------------------------------------

TensorView integers(std::vector<std::int32_t>& values, std::int64_t rows, std::int64_t columns) {
  TensorView view;
  view.data = values.data();
  view.dtype = DType::int32;
  view.device = DeviceKind::cpu;
  view.rank = columns > 0 ? 2 : 1;
  view.size[0] = rows;
  view.size[1] = columns;
  view.stride[0] = columns > 0 ? columns : 1;
  view.stride[1] = 1;
  return view;
}

void test_group(const Case& c, const Threads& threads) {
  std::mt19937 random(static_cast<unsigned>(c.queries * 131 + c.keys * 17 + c.head_dim));
  const DType wide = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  Tensor q(c.dtype, c.batch, c.heads, c.queries, c.head_dim, c.gap, true);
  Tensor k(c.dtype, c.batch, c.kv_heads, c.keys, c.head_dim, c.gap);
  q.randomize(random);
  k.randomize(random);
  std::vector<Tensor> v, dout;
  for (int l = 0; l < c.layers; ++l) {
    v.emplace_back(c.dtype, c.batch, c.kv_heads, c.keys, c.value_dim, c.gap, true).randomize(random);
    dout.emplace_back(c.dtype, c.batch, c.heads, c.queries, c.value_dim, c.gap).randomize(random);
  }
  std::vector<std::int32_t> length_values, first_values;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    length_values.push_back(static_cast<std::int32_t>(random() % (c.keys + 1)));
    std::int32_t first = 0;
    for (std::int64_t i = 0; i < c.queries; ++i)
      first_values.push_back(first = std::min<std::int32_t>(static_cast<std::int32_t>(c.keys), first + random() % 3));
  }
  const TensorView lengths = integers(length_values, c.batch, 0), first_key = integers(first_values, c.batch, c.queries);
  Options options;
  options.causal = c.causal;
  if (c.ragged) options.lengths = &lengths, options.first_key = &first_key;
  const Problem p = check("attention", q.view, k.view, &v[0].view, options);

  Matrix probs, lse_wanted;
  reference_probs(p, q, k, probs, lse_wanted);
  const Gradients wanted = reference_gradients(p, probs, q, k, v, dout);

  Tensor lse(wide, 1, c.batch, c.heads, c.queries);
  Tensor kept(c.dtype, 1, c.batch, c.heads, probs_elements(c.queries, c.keys, c.causal));
  Tensor out(c.dtype, c.batch, c.heads, c.queries, c.value_dim, c.gap, true);
  forward({p, q.view, k.view, v[0].view, out.view, lse.view.data, kept.view.data}, threads);
  compare(out, reference_out(p, probs, v[0]), c, "out, kept");
  Tensor lse_again(wide, 1, c.batch, c.heads, c.queries), out_again = Tensor(c.dtype, c.batch, c.heads, c.queries, c.value_dim);
  forward({p, q.view, k.view, v[0].view, out_again.view, lse_again.view.data, nullptr}, threads);
  compare(out_again, reference_out(p, probs, v[0]), c, "out");
  Difference lse_difference;
  for (std::size_t i = 0; i < lse_wanted.size(); ++i) lse_difference.add(lse.read(i), lse_wanted[i]);
  for (std::size_t i = 0; i < lse_wanted.size(); ++i) lse_difference.add(lse_again.read(i), lse_wanted[i]);
  lse_difference.expect_below(tolerance(wide), c, "lse");

  for (const void* source : {static_cast<const void*>(nullptr), static_cast<const void*>(kept.view.data)}) {
    Tensor others(wide, 1, c.batch, c.heads, c.queries);
    for (std::size_t i = 0; i < lse_wanted.size(); ++i) others.set(0, 0, 0, static_cast<std::int64_t>(i), 0.0);
    for (int l = 1; l < c.layers; ++l) {
      Tensor consumer_out(c.dtype, c.batch, c.heads, c.queries, c.value_dim), delta(wide, 1, c.batch, c.heads, c.queries);
      Tensor dv(l % 2 ? wide : c.dtype, c.batch, c.kv_heads, c.keys, c.value_dim, c.gap);
      shared_forward({p, q.view, k.view, v[l].view, lse.view.data, source, consumer_out.view}, threads);
      shared_backward({p, q.view, k.view, lse.view.data, source, dout[l].view, consumer_out.view, dv.view, delta.view.data},
                      threads);
      compare(consumer_out, reference_out(p, probs, v[l]), c, source ? "consumer's out from probs" : "consumer's out from lse");
      compare(dv, wanted.dv[l], c, source ? "consumer's dv from probs" : "consumer's dv from lse");
      for (std::size_t i = 0; i < lse_wanted.size(); ++i)
        others.set(0, 0, 0, static_cast<std::int64_t>(i), others.read(i) + delta.read(i));
    }
    std::vector<TensorView> douts, values;
    for (int l = 0; l < c.layers; ++l) douts.push_back(dout[l].view), values.push_back(v[l].view);
    Tensor dq(c.dtype, c.batch, c.heads, c.queries, c.head_dim, c.gap), dk(wide, c.batch, c.kv_heads, c.keys, c.head_dim);
    Tensor dv(c.dtype, c.batch, c.kv_heads, c.keys, c.value_dim), dk_again = dk, dv_again = dv, dq_again = dq;
    dq_again.view.data = dq_again.memory.data(), dk_again.view.data = dk_again.memory.data(),
    dv_again.view.data = dv_again.memory.data();
    Backward args{p,        q.view,   k.view,       lse.view.data, source,
                  out.view, c.layers, douts.data(), values.data(), c.layers > 1 ? others.view.data : nullptr,
                  dq.view,  dk.view,  dv.view};
    backward(args, threads);
    compare(dq, wanted.dq, c, source ? "dq from probs" : "dq from lse");
    compare(dk, wanted.dk, c, source ? "dk from probs" : "dk from lse");
    compare(dv, wanted.dv[0], c, source ? "dv from probs" : "dv from lse");
    args.dq = dq_again.view, args.dk = dk_again.view, args.dv = dv_again.view;
    backward(args, Threads{});
    expect(dq.memory == dq_again.memory && dk.memory == dk_again.memory && dv.memory == dv_again.memory,
           text(c) + ": gradients depend on the number of threads");
  }
}

void test_decode(const Case& c, const Threads& threads) {
  std::mt19937 random(static_cast<unsigned>(c.keys));
  const DType wide = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  Tensor q(c.dtype, c.batch, c.heads, 1, c.head_dim), k(c.dtype, c.batch, c.kv_heads, c.keys, c.head_dim, c.gap, true);
  Tensor v(c.dtype, c.batch, c.kv_heads, c.keys, c.value_dim, c.gap), next = v;
  next.view.data = next.memory.data();
  for (Tensor* tensor : {&q, &k, &v, &next}) tensor->randomize(random);
  std::vector<std::int32_t> length_values, first_values;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    length_values.push_back(static_cast<std::int32_t>(b == 0 ? c.keys : random() % (c.keys + 1)));
    first_values.push_back(static_cast<std::int32_t>(b == 0 ? 0 : random() % (c.keys + 1)));
  }
  const TensorView lengths = integers(length_values, c.batch, 0), first_key = integers(first_values, c.batch, 0);
  Options options;
  options.lengths = &lengths;
  options.first_key = &first_key;
  const Problem p = check("decode_attention", q.view, k.view, &v.view, options);
  Matrix probs, lse;
  reference_probs(p, q, k, probs, lse);
  Tensor out(c.dtype, c.batch, c.heads, 1, c.value_dim), again = out, third = out;
  again.view.data = again.memory.data(), third.view.data = third.memory.data();
  const std::int64_t chunks = (c.keys + decode_chunk - 1) / decode_chunk;
  Tensor weights(c.dtype, 1, c.batch, c.heads, c.keys), scales(wide, 1, c.batch, c.heads, chunks);
  decode({p, q.view, k.view, v.view, out.view, weights.view.data, scales.view.data}, threads);
  compare(out, reference_out(p, probs, v), c, "decode");
  decode({p, q.view, k.view, v.view, again.view, nullptr, nullptr}, threads);
  compare(again, reference_out(p, probs, v), c, "decode without probs");
  decode_from_probs({p, weights.view.data, scales.view.data, next.view, third.view}, threads);
  compare(third, reference_out(p, probs, next), c, "decode from probs");
  Difference difference;
  for (std::int64_t row = 0; row < c.batch * c.heads; ++row)
    for (std::int64_t j = 0; j < c.keys; ++j)
      difference.add(weights.read(row * c.keys + j) * scales.read(row * chunks + j / decode_chunk), probs[row * c.keys + j]);
  difference.expect_below(tolerance(c.dtype), c, "decode's probs");
}

void expect_refusal(const std::string& wanted, const TensorView& q, const TensorView& k, const TensorView& v,
                    const Options& options) {
  try {
    check("attention", q, k, &v, options);
    expect(false, "not refused: " + wanted);
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()) == "effcore.attention: " + wanted, std::string("message: ") + error.what());
  }
}

void test_refusals() {
  const Tensor q(DType::float32, 2, 4, 5, 8), k(DType::float32, 2, 2, 16, 8), v(DType::float32, 2, 2, 16, 6);
  expect_refusal("v has 12 tokens but k has 16", q.view, k.view, Tensor(DType::float32, 2, 2, 12, 6).view, {});
  expect_refusal("q has 4 heads, which is no multiple of the 3 heads of k", q.view, Tensor(DType::float32, 2, 3, 16, 8).view,
                 v.view, {});
  expect_refusal("k is bfloat16 but q is float32", q.view, Tensor(DType::bfloat16, 2, 2, 16, 8).view, v.view, {});
  expect_refusal("k has head dimension 9 but q has 8", q.view, Tensor(DType::float32, 2, 2, 16, 9).view, v.view, {});
  TensorView strided = v.view;
  strided.stride[3] = 2;
  expect_refusal("v must be contiguous in its last dimension but has stride 2 there", q.view, k.view, strided, {});
  Options options;
  options.scale = std::numeric_limits<double>::infinity();
  expect_refusal("scale must be finite but is inf", q.view, k.view, v.view, options);
  std::vector<std::int32_t> long_values{3, 17}, falling{0, 1, 2, 1, 4, 0, 0, 0, 0, 0};
  const TensorView lengths = integers(long_values, 2, 0), first_key = integers(falling, 2, 5);
  options = {};
  options.lengths = &lengths;
  expect_refusal("lengths[1] is 17 but k has 16 tokens", q.view, k.view, v.view, options);
  options = {};
  options.first_key = &first_key;
  expect_refusal("first_key must not decrease along the queries but falls from 2 to 1 at query 3 of row 0", q.view, k.view,
                 v.view, options);
}

// What nobody sees may hold anything; what a row sees spoils that row alone.
void test_nan(DType dtype) {
  const Case c{dtype, 1, 1, 1, 70, 140, 16, 16, false, false, 1, 0};
  std::mt19937 random(1);
  Tensor q(dtype, 1, 1, 70, 16), k(dtype, 1, 1, 140, 16), v(dtype, 1, 1, 140, 16), out(dtype, 1, 1, 70, 16);
  for (Tensor* tensor : {&q, &k, &v}) tensor->randomize(random);
  for (std::int64_t d = 0; d < 16; ++d) {
    for (std::int64_t j = 100; j < 140; ++j) k.set(0, 0, j, d, NAN), v.set(0, 0, j, d, NAN);
    q.set(0, 0, 3, d, NAN);
  }
  std::vector<std::int32_t> length{100};
  const TensorView lengths = integers(length, 1, 0);
  Options options;
  options.lengths = &lengths;
  const Problem p = check("attention", q.view, k.view, &v.view, options);
  Tensor lse(dtype == DType::float64 ? dtype : DType::float32, 1, 1, 1, 70);
  forward({p, q.view, k.view, v.view, out.view, lse.view.data, nullptr}, Threads{});
  int wrong = 0;
  for (std::int64_t i = 0; i < 70; ++i)
    for (std::int64_t d = 0; d < 16; ++d) wrong += std::isnan(out.get(0, 0, i, d)) != (i == 3);
  expect(wrong == 0, text(c) + ": NaN in the wrong rows");
}

void run_all() {
  const DType dtypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
  for (const DType dtype : dtypes) {
    for (const Case& c :
         {Case{dtype, 2, 4, 2, 67, 67, 64, 64, true, false, 2, 0}, Case{dtype, 1, 2, 2, 130, 257, 33, 80, true, true, 3, 3},
          Case{dtype, 2, 3, 1, 5, 200, 128, 17, false, true, 1, 5}, Case{dtype, 1, 1, 1, 140, 60, 1, 1, true, false, 2, 0},
          Case{dtype, 1, 2, 1, 0, 9, 8, 8, false, false, 1, 0}, Case{dtype, 1, 2, 1, 9, 0, 8, 8, false, false, 2, 0},
          Case{dtype, 0, 2, 1, 9, 9, 8, 8, true, false, 1, 0}, Case{dtype, 1, 2, 1, 65, 600, 24, 256, false, false, 1, 1}}) {
      test_group(c, three_threads);
      test_decode(c, three_threads);
    }
    test_decode({dtype, 2, 4, 2, 1, 2100, 64, 40, false, false, 1, 0}, three_threads);
    test_nan(dtype);
  }
  test_refusals();
}

const test::Suite suite(run_all);

}  // namespace
