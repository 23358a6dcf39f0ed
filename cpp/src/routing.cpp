// Moving rows on the CPU: gather, merge, and the gather's gradient. Bound: memory; each row is read and written once.
#include "effcore/routing.h"

#include <algorithm>
#include <cstring>

#include "effcore/cpu.h"
#include "routing_kernels.h"
#include "routing_rows.h"
#include "scratch.h"

namespace effcore::routing {

const RowKernels& row_kernels(DType dtype) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::amx:
    case Isa::v4: return v4::row_kernels(dtype);
    case Isa::v3: return v3::row_kernels(dtype);
    default: break;
  }
#endif
  return v2::row_kernels(dtype);
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

bool dense(const TensorView& t) {
  return t.stride[1] == t.size[2];
}

// A list's rows, and which tokens of x they are.
struct Listed {
  Rows rows;
  Lists index;
  bool together;  // neighbouring tokens are neighbours in memory on both sides

  Listed(const List& list, const TensorView& x) : rows(list.rows), index(list.index), together(dense(x) && dense(list.rows)) {}

  // How many rows from i on, below `last`, move in one piece.
  std::int64_t run(std::int64_t b, std::int64_t i, std::int64_t last) const {
    std::int64_t n = 1;
    if (together)
      while (i + n < last && index(b, i + n) == index(b, i) + n) ++n;
    return n;
  }
};

// Runs n = body(l, b, i, last) over all rows of the lists in one parallel loop: it moves rows [i, i + n) of list l, n >= 1, up
// to `last`. Each thread goes on at two places in turn: at every new 4 KiB page it waits for the first lines, and so for two
// pages at once (12 to 14 % less time for [8x197, 384], [32x197, 384] and [1024, 768] float32 there and back on two cores;
// three or four places are no better, prefetching the next row gains half of it, stores past the caches lose where the
// allocator hands out memory that a cache still holds).
template <class Body>
void for_lists(const Threads& threads, const List* lists, int count, std::int64_t row_bytes, const Body& body) {
  const std::int64_t batch = lists[0].rows.size[0], of_first = batch * lists[0].rows.size[1];
  const std::int64_t items = of_first + (count > 1 ? batch * lists[1].rows.size[1] : 0);
  const auto some = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t middle = begin + (end - begin) / 2, ends[2] = {middle, end};
    std::int64_t next[2] = {begin, middle};
    while (next[0] < ends[0] || next[1] < ends[1])
      for (int place = 0; place < 2; ++place) {
        if (next[place] >= ends[place]) continue;
        const int l = next[place] >= of_first;
        const std::int64_t size = lists[l].rows.size[1], item = next[place] - (l ? of_first : 0), i = item % size;
        next[place] += body(l, item / size, i, std::min(size, i + ends[place] - next[place]));
      }
  };
  if (items * row_bytes <= serial_bytes) return some(0, items);
  threads(items, some);
}

}  // namespace

void gather(const Gather& args, const Threads& threads) {
  if (args.x.size[2] == 0) return;
  const Rows from(args.x);
  const Listed to[2] = {{args.list[0], args.x}, {args.list[args.lists - 1], args.x}};
  for_lists(threads, args.list, args.lists, from.bytes, [&](int l, std::int64_t b, std::int64_t i, std::int64_t last) {
    const std::int64_t n = to[l].run(b, i, last);
    std::memcpy(to[l].rows(b, i), from(b, to[l].index(b, i)), n * from.bytes);
    return n;
  });
}

void merge(const Merge& args, const Threads& threads) {
  if (args.out.size[2] == 0) return;
  const Rows out(args.out);
  const Listed from[2] = {{args.list[0], args.out}, {args.list[1], args.out}};
  const RowKernels& kernels = row_kernels(args.out.dtype);
  for_lists(threads, args.list, 2, out.bytes, [&](int l, std::int64_t b, std::int64_t i, std::int64_t last) {
    const std::int64_t token = from[l].index(b, i);
    const TensorView* first_residual = l == 0 ? args.first_residual : nullptr;
    std::int64_t n = 1;
    if (args.residual == nullptr && first_residual == nullptr) {
      n = from[l].run(b, i, last);
      std::memcpy(out(b, token), from[l].rows(b, i), n * out.bytes);
    } else {
      const void* own = first_residual != nullptr ? Rows(*first_residual)(b, i) : nullptr;
      const void* all = args.residual != nullptr ? Rows(*args.residual)(b, token) : nullptr;
      if (own == nullptr) std::swap(own, all);
      kernels.sum(out(b, token), from[l].rows(b, i), own, all, args.out.size[2]);
    }
    return n;
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
