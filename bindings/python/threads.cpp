// A pool of threads that sleep between loops. The calling thread takes part in its loop, so `count` threads are count - 1
// sleeping ones. One loop runs at a time: a second caller, or a loop inside a loop, runs on its own thread alone.
#include "bindings/python/threads.h"

#ifdef __linux__
#include <sched.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "effcore/error.h"

namespace effcore::python {
namespace {

int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS"); text != nullptr) {
    // "4", or "4,2" for nested levels, of which the first counts
    const long count = std::strtol(text, nullptr, 10);
    if (count >= 1 && count <= 1024) return static_cast<int>(count);
  }
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

// A loop cut into `pieces` ranges of nearly equal length; whoever is free takes the next.
struct Loop {
  std::int64_t count = 0, pieces = 0;
  LoopBody body = nullptr;
  void* context = nullptr;
  std::atomic<std::int64_t> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;

  void work() {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      try {
        body(context, count * i / pieces, count * (i + 1) / pieces);
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        if (!failure) failure = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  // True if the loop was run; false if the pool is taken.
  bool run(int workers, Loop& loop) {
    const std::unique_lock taken(one_loop_, std::try_to_lock);
    if (!taken.owns_lock()) return false;
    {
      const std::lock_guard lock(mutex_);
      start(workers - 1);
      loop_ = &loop;
      wanted_ = workers - 1;
      ++round_;
    }
    wake_.notify_all();
    loop.work();
    // Who has not woken by now finds nothing left to do, and is not waited for.
    std::unique_lock lock(mutex_);
    loop_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void start(int helpers) {
    try {
      for (; started_ < helpers; ++started_) std::thread(&Pool::serve, this, started_).detach();
    } catch (const std::system_error&) {  // the machine gives no more threads: go on with those that there are
    }
  }
  void serve(int index);

  std::mutex one_loop_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  std::uint64_t round_ = 0;
  int started_ = 0, wanted_ = 0, active_ = 0;
};

thread_local bool inside_loop = false;

void Pool::serve(int index) {
  inside_loop = true;
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return round_ != seen && loop_ != nullptr; });
    seen = round_;
    if (index >= wanted_) continue;  // fewer threads were asked for
    Loop* loop = loop_;
    ++active_;
    lock.unlock();
    loop->work();
    lock.lock();
    if (--active_ == 0) done_.notify_one();
  }
}

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, so it gets a pool of its own.
Pool& pool() {
  struct Owned {
    Pool* pool;
    pid_t process;
  };
  static std::atomic<Owned*> current{nullptr};
  Owned* owned = current.load(std::memory_order_acquire);
  while (owned == nullptr || owned->process != getpid()) {
    auto* fresh = new Owned{new Pool, getpid()};
    if (current.compare_exchange_strong(owned, fresh, std::memory_order_acq_rel)) return *fresh->pool;
    delete fresh->pool;
    delete fresh;
  }
  return *owned->pool;
}

std::atomic<int> thread_count{0};

void parallel_for(std::int64_t count, LoopBody body, void* context) {
  const int workers = static_cast<int>(std::min<std::int64_t>(num_threads(), count));
  Loop loop;
  loop.count = count;
  loop.pieces = workers;
  loop.body = body;
  loop.context = context;
  if (workers > 1 && !inside_loop) {
    inside_loop = true;
    const bool done = pool().run(workers, loop);
    inside_loop = false;
    if (!done) loop.work();
  } else {
    loop.work();
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace

int num_threads() {
  int count = thread_count.load(std::memory_order_relaxed);
  if (count == 0) {
    int unset = 0;
    count = default_threads();
    if (!thread_count.compare_exchange_strong(unset, count)) count = unset;
  }
  return count;
}

void set_num_threads(int count) {
  check(count >= 1 && count <= 1024, "array.set_num_threads", "count must be 1 to 1024, got ", count);
  thread_count.store(count);
}

Threads threads() {
  return {num_threads(), parallel_for};
}

}  // namespace effcore::python
