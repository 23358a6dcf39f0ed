// Which arguments attention takes. Everything is refused here, by name, before a kernel runs.
#include <cmath>
#include <cstring>

#include "effcore/attention.h"
#include "effcore/error.h"

namespace effcore::attention {

using effcore::check;

namespace {

constexpr std::int64_t max_head_dim = 256;

void check_input(const char* function, const char* argument, const TensorView& t, const TensorView& q) {
  check(t.rank == 4, function, argument, " must have 4 dimensions [batch, heads, tokens, head_dim] but has shape ", shape(t));
  check(t.dtype == q.dtype, function, argument, " is ", name(t.dtype), " but q is ", name(q.dtype));
  check(t.device == q.device && t.device_index == q.device_index, function, argument, " is on ", place(t), " but q is on ",
        place(q));
  check(contiguous_last(t), function, argument, " must be contiguous in its last dimension but has stride ", t.stride[3],
        " there");
}

void check_head_dim(const char* function, const char* argument, std::int64_t head_dim) {
  check(head_dim >= 1 && head_dim <= max_head_dim, function, argument, " has head dimension ", head_dim, " but 1 to ",
        max_head_dim, " are supported");
}

void check_integers(const char* function, const char* argument, const TensorView& t, const TensorView& q) {
  check(t.dtype == DType::int32, function, argument, " must be int32 but is ", name(t.dtype));
  check(t.device == q.device && t.device_index == q.device_index, function, argument, " is on ", place(t), " but q is on ",
        place(q));
}

void check_lengths(const char* function, const TensorView& lengths, const TensorView& q, Problem& p) {
  check_integers(function, "lengths", lengths, q);
  check(lengths.rank == 1 && lengths.size[0] == p.batch, function, "lengths must have shape [", p.batch, "] but has ",
        shape(lengths));
  p.lengths = static_cast<const std::int32_t*>(lengths.data);
  p.lengths_stride = lengths.stride[0];
  if (p.device != DeviceKind::cpu) return;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int32_t length = p.lengths[b * p.lengths_stride];
    check(length >= 0 && length <= p.keys, function, "lengths[", b, "] is ", length, " but k has ", p.keys, " tokens");
  }
}

void check_first_key(const char* function, const TensorView& first, const TensorView& q, Problem& p) {
  check_integers(function, "first_key", first, q);
  const bool per_row = first.rank == 1 && first.size[0] == p.batch;
  const bool per_query = first.rank == 2 && first.size[0] == p.batch && first.size[1] == p.queries;
  check(per_row || per_query, function, "first_key must have shape [", p.batch, "] or [", p.batch, ", ", p.queries,
        "] but has ", shape(first));
  p.first_key = static_cast<const std::int32_t*>(first.data);
  p.first_key_stride[0] = first.stride[0];
  p.first_key_stride[1] = per_query ? first.stride[1] : 0;
  if (p.device != DeviceKind::cpu) return;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    std::int32_t before = 0;
    for (std::int64_t i = 0; i < (per_query ? p.queries : 1); ++i) {
      const std::int32_t value = p.first_key[b * p.first_key_stride[0] + i * p.first_key_stride[1]];
      check(value >= 0 && value <= p.keys, function, "first_key holds ", value, " in row ", b, " but k has ", p.keys,
            " tokens");
      check(value >= before, function, "first_key must not decrease along the queries but falls from ", before, " to ", value,
            " at query ", i, " of row ", b);
      before = value;
    }
  }
}

}  // namespace

Problem check(const char* function, const TensorView& q, const TensorView& k, const TensorView* v, const Options& options) {
  const DType dtype = q.dtype;
  check(q.device == DeviceKind::cpu || q.device == DeviceKind::cuda, function, "q is on ", name(q.device),
        " but cpu and cuda are supported");
  check(dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16 ||
            (dtype == DType::float64 && q.device == DeviceKind::cpu),
        function, "q is ", name(dtype), " but float32, bfloat16, float16 and (on cpu) float64 are supported");
  check_input(function, "q", q, q);
  check_input(function, "k", k, q);
  Problem p;
  p.dtype = dtype;
  p.device = q.device;
  p.batch = q.size[0];
  p.heads = q.size[1];
  p.queries = q.size[2];
  p.head_dim = q.size[3];
  p.kv_heads = k.size[1];
  p.keys = k.size[2];
  p.causal = options.causal;
  check_head_dim(function, "q", p.head_dim);
  check(k.size[0] == p.batch, function, "k has batch size ", k.size[0], " but q has ", p.batch);
  check(k.size[3] == p.head_dim, function, "k has head dimension ", k.size[3], " but q has ", p.head_dim);
  check(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, function, "q has ", p.heads,
        " heads, which is no multiple of the ", p.kv_heads, " heads of k");
  if (v != nullptr) {
    check_input(function, "v", *v, q);
    check(v->size[0] == p.batch, function, "v has batch size ", v->size[0], " but q has ", p.batch);
    check(v->size[1] == p.kv_heads, function, "v has ", v->size[1], " heads but k has ", p.kv_heads);
    check(v->size[2] == p.keys, function, "v has ", v->size[2], " tokens but k has ", p.keys);
    p.value_dim = v->size[3];
    check_head_dim(function, "v", p.value_dim);
  }
  p.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  check(std::isfinite(p.scale), function, "scale must be finite but is ", p.scale);
  if (options.lengths != nullptr) check_lengths(function, *options.lengths, q, p);
  if (options.first_key != nullptr) check_first_key(function, *options.first_key, q, p);
  return p;
}

void check_tensor(const char* function, const char* argument, const TensorView& tensor, const Problem& problem, DType dtype,
                  std::initializer_list<std::int64_t> sizes) {
  check(tensor.device == problem.device, function, argument, " is on ", name(tensor.device), " but q is on ",
        name(problem.device));
  check(tensor.dtype == dtype, function, argument, " is ", name(tensor.dtype), " but must be ", name(dtype));
  bool same = tensor.rank == static_cast<int>(sizes.size());
  int dimension = 0;
  for (const std::int64_t size : sizes) {
    if (same && tensor.size[dimension] != size) same = false;
    ++dimension;
  }
  if (!same) {
    fail(function, argument, " must have shape ", shape(sizes), " but has ", shape(tensor));
  }
  const int last = tensor.rank - 1;
  check(contiguous_last(tensor), function, argument, " must be contiguous in its last dimension but has stride ",
        last < 0 ? 0 : tensor.stride[last], " there");
}

}  // namespace effcore::attention
