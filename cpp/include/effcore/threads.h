// Threads come from the caller (torch's pool under torch, a pool of the binding's under NumPy): the core owns none.
#pragma once
#include <cstdint>

namespace effcore {

// Runs body(context, begin, end) over pieces of [0, count) of at least one item each, possibly at the same time, and
// returns when all have ended.
using LoopBody = void (*)(void* context, std::int64_t begin, std::int64_t end);
using ParallelFor = void (*)(std::int64_t count, LoopBody body, void* context);

struct Threads {
  int count = 1;
  ParallelFor parallel_for = nullptr;  // null: run on the calling thread

  template <class Body>
  void operator()(std::int64_t items, const Body& body) const {
    if (items <= 0) return;
    if (parallel_for == nullptr || count == 1 || items == 1) return body(std::int64_t{0}, items);
    parallel_for(
        items, [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace effcore
