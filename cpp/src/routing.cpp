// Moving rows on the CPU: gather, merge, and the gather's gradient. Bound: memory; each row is read and written once.
#include "effcore/routing.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "choose.h"
#include "routing_kernels.h"
#include "routing_rows.h"
#include "scratch.h"

namespace effcore::routing {

const RowKernels& row_kernels(DType dtype) {
  EFFCORE_RETURN_VECTORS(row_kernels, dtype)
}

namespace {

// Waking a pool costs more than moving this many bytes.
constexpr std::int64_t serial_bytes = 64 << 10;

// Runs body(b, first, last) over pieces of the list of each batch row.
template <class Body>
void for_rows(const Threads& threads, std::int64_t batch, std::int64_t size, std::int64_t row_bytes, const Body& body) {
  if (batch == 0 || size == 0) return;
  const auto some = [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t b = begin / size, first = begin % size, last = std::min(size, first + end - begin);
      body(b, first, last);
      begin += last - first;
    }
  };
  if (batch * size * row_bytes <= serial_bytes) return some(0, batch * size);
  threads(batch * size, some);
}

// A row of a list: rows[b, place] of it is token `token` of batch row b.
struct Item {
  int list;
  std::int64_t b, place, token;
};

// Walks through a share of one list or of two: in each batch row the smaller of the lists' next tokens comes first. So the rows
// of a partition are read in one stream and written in two, or the other way round, each from one end to the other; and what
// a thread has taken apart it puts together again. (Right for lists in any order: a share is a range of each list.)
class Walk {
 public:
  // Items [begin, end) of the batch * (size of both lists).
  Walk(const Lists* index, const std::int64_t* size, std::int64_t begin, std::int64_t end)
      : index_(index), size_{size[0], size[1]}, next_(begin), end_(end) {}

  bool next(Item& item) {
    if (token_[0] == none && token_[1] == none && !next_row()) return false;
    item = token_[0] <= token_[1] ? take(0) : take(1);
    return true;
  }

 private:
  static constexpr std::int64_t none = std::numeric_limits<std::int64_t>::max();

  Item take(int l) {
    const Item item{l, b_, at_[l]++, token_[l]};
    look(l);
    return item;
  }
  void look(int l) { token_[l] = at_[l] < last_[l] ? std::int64_t{index_[l](b_, at_[l])} : none; }
  bool next_row() {
    if (next_ >= end_) return false;
    const std::int64_t both = size_[0] + size_[1], first = next_ % both, last = std::min(both, first + end_ - next_);
    b_ = next_ / both;
    next_ += last - first;
    at_[0] = size_[0] * first / both, last_[0] = size_[0] * last / both;  // evenly out of both lists
    at_[1] = first - at_[0], last_[1] = last - last_[0];
    look(0), look(1);
    return true;
  }

  const Lists* index_;
  std::int64_t size_[2], next_, end_, b_ = 0, at_[2] = {}, last_[2] = {};
  std::int64_t token_[2] = {none, none};  // the lists' next ones
};

// Runs body(item) for all rows of the lists in one parallel loop. Each thread walks at two places in turn: at every new page it
// waits for the first lines, and so for two pages at once (4 to 9 % less time for [8x197, 384], [32x197, 384] and [1024, 768]
// float32 there and back on two cores; four places are no better, prefetching gains 3 % at most; list after list instead of
// token after token takes 16 to 39 % more).
template <class Body>
void for_lists(const Threads& threads, const List* lists, int count, std::int64_t row_bytes, const Body& body) {
  const Lists index[2] = {Lists(lists[0].index), Lists(lists[count - 1].index)};
  const std::int64_t size[2] = {lists[0].rows.size[1], count > 1 ? lists[1].rows.size[1] : 0};
  const std::int64_t items = lists[0].rows.size[0] * (size[0] + size[1]);
  const auto some = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t middle = begin + (end - begin) / 2;
    Walk walks[2] = {{index, size, begin, middle}, {index, size, middle, end}};
    Item item;
    for (bool more = true; more;) {
      more = false;
      for (Walk& walk : walks)
        if (walk.next(item)) body(item), more = true;
    }
  };
  if (items * row_bytes <= serial_bytes) return some(0, items);
  threads(items, some);
}

}  // namespace

void gather(const Gather& args, const Threads& threads) {
  if (args.x.size[2] == 0) return;
  const Rows from(args.x), to[2] = {Rows(args.list[0].rows), Rows(args.list[args.lists - 1].rows)};
  for_lists(threads, args.list, args.lists, from.bytes,
            [&](const Item& item) { std::memcpy(to[item.list](item.b, item.place), from(item.b, item.token), from.bytes); });
}

void merge(const Merge& args, const Threads& threads) {
  if (args.out.size[2] == 0) return;
  const Rows out(args.out), from[2] = {Rows(args.list[0].rows), Rows(args.list[1].rows)};
  const RowKernels& kernels = row_kernels(args.out.dtype);
  for_lists(threads, args.list, 2, out.bytes, [&](const Item& item) {
    const auto& [l, b, place, token] = item;
    const void* own = l == 0 && args.first_residual != nullptr ? Rows(*args.first_residual)(b, place) : nullptr;
    const void* all = args.residual != nullptr ? Rows(*args.residual)(b, token) : nullptr;
    if (own == nullptr) std::swap(own, all);
    if (own == nullptr)
      std::memcpy(out(b, token), from[l](b, place), out.bytes);
    else
      kernels.sum(out(b, token), from[l](b, place), own, all, args.out.size[2]);
  });
}

void scatter(const Scatter& args, const Threads& threads) {
  const std::int64_t batch = args.dx.size[0], tokens = args.dx.size[1], channels = args.dx.size[2];
  if (batch * tokens * channels == 0) return;
  const Rows dx(args.dx), rows(args.list.rows);
  const Inverse inverse(args.list.index, tokens, threads, 0);
  const RowKernels& kernels = row_kernels(args.dx.dtype);
  for_rows(threads, batch, tokens, dx.bytes, [&](std::int64_t b, std::int64_t first, std::int64_t last) {
    for (std::int64_t n = first; n < last; ++n) {
      std::int32_t i = inverse.first(b, n);
      if (i < 0) {
        std::memset(dx(b, n), 0, dx.bytes);
      } else if (inverse.next(b, i) < 0) {
        std::memcpy(dx(b, n), rows(b, i), dx.bytes);
      } else {
        void* const sums = scratch::get(scratch::Slot::local, channels * sum_size(args.dx.dtype));
        kernels.load(sums, rows(b, i), channels);
        while ((i = inverse.next(b, i)) >= 0) kernels.add(sums, rows(b, i), channels);
        kernels.store(dx(b, n), sums, channels);
      }
    }
  });
}

}  // namespace effcore::routing
