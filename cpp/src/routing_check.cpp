// Which arguments token movement takes. Everything is refused here, by name, before a kernel runs.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "effcore/error.h"
#include "effcore/routing.h"
#include "scratch.h"

namespace effcore::routing {

using effcore::check;

namespace {

void check_device(const char* function, const char* argument, const TensorView& t, const TensorView& like) {
  check(t.device == like.device && t.device_index == like.device_index, function, argument, " is on ", place(t),
        " but its tokens are on ", place(like));
}

void check_last(const char* function, const char* argument, const TensorView& t) {
  const int last = t.rank - 1;
  check(contiguous_last(t), function, argument, " must be contiguous in its last dimension but has stride ", t.stride[last],
        " there");
}

std::int32_t at(const TensorView& index, std::int64_t b, std::int64_t i) {
  return static_cast<const std::int32_t*>(index.data)[b * index.stride[0] + i * index.stride[1]];
}

// Calls body(token) for row b of a list.
template <class Body>
void for_row(const TensorView& index, std::int64_t b, const Body& body) {
  const auto* row = static_cast<const std::int32_t*>(index.data) + b * index.stride[0];
  const std::int64_t size = index.size[1], stride = index.stride[1];
  if (stride == 1)
    for (std::int64_t i = 0; i < size; ++i) body(row[i]);
  else
    for (std::int64_t i = 0; i < size; ++i) body(row[i * stride]);
}

void check_list_shape(const char* function, const char* argument, const TensorView& index, const TensorView& like) {
  check(index.dtype == DType::int32, function, argument,
        " must be int32 (as partition_tokens makes it; .int() converts) but is ", name(index.dtype));
  check_device(function, argument, index, like);
  check(index.rank == 2 && index.size[0] == like.size[0], function, argument, " must have shape [", like.size[0],
        ", tokens of the list] but has ", shape(index));
}

// Whether row b of a list names nothing but tokens below `tokens`. Every call asks: no branch a token.
bool inside(const TensorView& index, std::int64_t b, std::int64_t tokens) {
  const auto limit = static_cast<std::uint32_t>(std::min(tokens, std::int64_t{1} << 31));  // a negative one is above
  std::uint32_t outside = 0;
  for_row(index, b, [&](std::int32_t token) { outside |= static_cast<std::uint32_t>(token) >= limit; });
  return outside == 0;
}

void check_tokens(const char* function, const char* argument, const TensorView& index, std::int64_t b, std::int64_t tokens) {
  if (inside(index, b, tokens)) [[likely]]
    return;
  std::int64_t i = 0;
  while (at(index, b, i) >= 0 && at(index, b, i) < tokens) ++i;
  fail(function, argument, '[', b, ", ", i, "] is ", at(index, b, i), " but there are ", tokens, " tokens");
}

// Which token of row b do the lists name again? `seen` [tokens] is room.
void refuse_repeated(const char* function, const TensorView& index_a, const TensorView& index_b, std::int64_t b, char* seen,
                     std::int64_t tokens) {
  std::memset(seen, 0, tokens);
  for (const auto& [argument, index] : {std::pair{"index_a", &index_a}, std::pair{"index_b", &index_b}})
    for (std::int64_t i = 0; i < index->size[1]; ++i) {
      char& before = seen[at(*index, b, i)];
      check(!before, function, argument, '[', b, ", ", i, "] is ", at(*index, b, i), ", which index_a or index_b has already");
      before = 1;
    }
}

}  // namespace

void check_partition(const char* function, const TensorView& scores, std::int64_t keep, std::int64_t protect) {
  check_supported(function, "scores", scores);
  check(scores.rank == 2, function, "scores must have 2 dimensions [batch, tokens] but has shape ", shape(scores));
  check(scores.size[1] <= std::int64_t{1} << 30, function, "scores has ", scores.size[1],
        " tokens but at most 2^30 are supported");
  check_last(function, "scores", scores);
  check(keep >= 0 && keep <= scores.size[1], function, "keep must be from 0 to the ", scores.size[1], " tokens of a row, got ",
        keep);
  check(protect >= 0 && protect <= keep, function, "protect must be from 0 to keep (", keep, "), got ", protect);
}

void check_scores(const char* function, const TensorView& q, const TensorView& k, double scale) {
  check_supported(function, "q", q);
  for (const auto& [argument, t] : {std::pair{"q", &q}, std::pair{"k", &k}}) {
    check(t->rank == 4, function, argument, " must have 4 dimensions [batch, heads, tokens, head_dim] but has shape ",
          shape(*t));
    check(t->dtype == q.dtype, function, argument, " is ", name(t->dtype), " but q is ", name(q.dtype));
    check_device(function, argument, *t, q);
    check_last(function, argument, *t);
  }
  check(q.size[2] == 1, function, "q must hold one query a row (the class token's), got ", q.size[2]);
  check(k.size[0] == q.size[0], function, "k has batch size ", k.size[0], " but q has ", q.size[0]);
  check(k.size[3] == q.size[3], function, "k has head dimension ", k.size[3], " but q has ", q.size[3]);
  check(q.size[1] >= 1 && k.size[1] >= 1 && q.size[1] % k.size[1] == 0, function, "q has ", q.size[1],
        " heads, which is no multiple of the ", k.size[1], " heads of k");
  check(std::isfinite(scale), function, "scale must be finite but is ", scale);
}

void check_rows(const char* function, const char* argument, const TensorView& rows, const TensorView* like) {
  check_supported(function, argument, rows);
  check(rows.rank == 3, function, argument, " must have 3 dimensions [batch, tokens, channels] but has shape ", shape(rows));
  check_last(function, argument, rows);
  if (like == nullptr) return;
  check(rows.dtype == like->dtype, function, argument, " is ", name(rows.dtype), " but must be ", name(like->dtype));
  check_device(function, argument, rows, *like);
}

void check_list(const char* function, const char* argument, const TensorView& index, const TensorView& like,
                std::int64_t tokens) {
  check_list_shape(function, argument, index, like);
  if (like.device != DeviceKind::cpu) return;
  for (std::int64_t b = 0; b < index.size[0]; ++b) check_tokens(function, argument, index, b, tokens);
}

void check_lists(const char* function, const TensorView& index_a, const TensorView& index_b, const TensorView& like,
                 std::int64_t tokens) {
  check_list_shape(function, "index_a", index_a, like);
  check_list_shape(function, "index_b", index_b, like);
  check(index_a.size[1] + index_b.size[1] == tokens, function, "index_a and index_b name ", index_a.size[1], " and ",
        index_b.size[1], " tokens, which does not make the ", tokens, " tokens of a row");
  if (like.device != DeviceKind::cpu) return;
  // As long as a row together, the lists name each token once if they name all of them.
  auto* const seen = static_cast<char*>(scratch::get(scratch::Slot::shared, tokens));
  for (std::int64_t b = 0; b < index_a.size[0] && tokens > 0; ++b) {
    check_tokens(function, "index_a", index_a, b, tokens);
    check_tokens(function, "index_b", index_b, b, tokens);
    std::memset(seen, 0, tokens);
    for (const TensorView* index : {&index_a, &index_b}) for_row(*index, b, [seen](std::int32_t token) { seen[token] = 1; });
    if (std::memchr(seen, 0, tokens) != nullptr) refuse_repeated(function, index_a, index_b, b, seen, tokens);
  }
}

void check_weight(const char* function, const char* argument, const TensorView& weight, const TensorView& like) {
  check(weight.dtype == like.dtype || (weight.dtype == DType::float32 && like.dtype != DType::float64), function, argument,
        " is ", name(weight.dtype), " but must be ", name(like.dtype), " or float32");
  check_device(function, argument, weight, like);
  check(weight.rank == 1 && weight.size[0] == like.size[2], function, argument, " must have shape [", like.size[2],
        "] but has ", shape(weight));
  check_last(function, argument, weight);
}

}  // namespace effcore::routing
