// torch's thread pool as the core's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "effcore/threads.h"

namespace effcore::binding {

inline Threads threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](std::int64_t count, LoopBody body, void* context) {
            torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
          }};
}

}  // namespace effcore::binding
