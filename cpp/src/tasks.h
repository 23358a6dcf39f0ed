// Independent tasks of unequal cost over the caller's threads.
#pragma once
#include <atomic>
#include <cstdint>

#include "effcore/threads.h"

namespace effcore {

// Workers take the next task when they finish one, so a causal triangle needs no hand-made balance: put long tasks first.
// Which worker runs a task never changes what it computes.
template <class Task>
void run_tasks(const Threads& threads, std::int64_t tasks, const Task& task) {
  if (tasks <= 0) return;
  const std::int64_t workers = tasks < threads.count ? tasks : threads.count;
  std::atomic<std::int64_t> next{0};
  threads(workers, [&](std::int64_t, std::int64_t) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
  });
}

}  // namespace effcore
