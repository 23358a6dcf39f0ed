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

// Neighbouring tokens that are neighbours in memory on both sides are moved in one piece.
std::int64_t run_length(const Lists& index, std::int64_t b, std::int64_t i, std::int64_t last, bool dense) {
  std::int64_t n = 1;
  if (dense)
    while (i + n < last && index(b, i + n) == index(b, i) + n) ++n;
  return n;
}

bool dense(const TensorView& t) {
  return t.stride[1] == t.size[2];
}

// Runs body(l, b, first, last) over pieces of the lists, all of them in one parallel loop.
template <class Body>
void for_lists(const Threads& threads, const List* lists, int count, std::int64_t row_bytes, const Body& body) {
  const std::int64_t batch = lists[0].rows.size[0], of_first = batch * lists[0].rows.size[1];
  const std::int64_t items = of_first + (count > 1 ? batch * lists[1].rows.size[1] : 0);
  const auto some = [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const int l = begin >= of_first;
      const std::int64_t size = lists[l].rows.size[1], item = begin - (l ? of_first : 0);
      const std::int64_t first = item % size, last = std::min(size, first + end - begin);
      body(l, item / size, first, last);
      begin += last - first;
    }
  };
  if (items * row_bytes <= serial_bytes) return some(0, items);
  threads(items, some);
}

}  // namespace

void gather(const Gather& args, const Threads& threads) {
  if (args.x.size[2] == 0) return;
  const Rows from(args.x);
  for_lists(threads, args.list, args.lists, from.bytes, [&](int l, std::int64_t b, std::int64_t first, std::int64_t last) {
    const Rows to(args.list[l].rows);
    const Lists index(args.list[l].index);
    const bool together = dense(args.x) && dense(args.list[l].rows);
    for (std::int64_t i = first; i < last;) {
      const std::int64_t n = run_length(index, b, i, last, together);
      std::memcpy(to(b, i), from(b, index(b, i)), n * to.bytes);
      i += n;
    }
  });
}

void merge(const Merge& args, const Threads& threads) {
  if (args.out.size[2] == 0) return;
  const Rows out(args.out);
  const RowKernels& kernels = row_kernels(args.out.dtype);
  for_lists(threads, args.list, 2, out.bytes, [&](int l, std::int64_t b, std::int64_t first, std::int64_t last) {
    const List& list = args.list[l];
    const Rows from(list.rows);
    const Lists index(list.index);
    const TensorView* first_residual = l == 0 ? args.first_residual : nullptr;
    const bool plain = args.residual == nullptr && first_residual == nullptr;
    const bool together = plain && dense(args.out) && dense(list.rows);
    for (std::int64_t i = first; i < last;) {
      const std::int64_t token = index(b, i), n = run_length(index, b, i, last, together);
      if (plain) {
        std::memcpy(out(b, token), from(b, i), n * out.bytes);
      } else {
        const void* own = first_residual != nullptr ? Rows(*first_residual)(b, i) : nullptr;
        const void* all = args.residual != nullptr ? Rows(*args.residual)(b, token) : nullptr;
        if (own == nullptr) std::swap(own, all);
        kernels.sum(out(b, token), from(b, i), own, all, args.out.size[2]);
      }
      i += n;
    }
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
