// How ragged groups become work of even size, on the device: nobody waits to learn how many tokens an expert has.
//
// An expert's tokens are cut into segments of at most `length`; an expert without tokens has one empty segment. A segment that
// is its expert's only one writes the result; others write partial sums into numbered slots, which a second kernel adds up in
// their order: the same sums in every run.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace effcore::cuda::kronecker {

struct Segment {
  int expert;  // -1: no segment
  int begin, end;
  int slot;  // of partial sums; -1: the expert's only segment
};

// Of one expert, for the sum over its segments. slots == 0: nothing to add up.
struct Slots {
  int first, slots;
};

struct Groups {
  const std::int32_t* offsets;  // [experts + 1]
  int experts, tokens, length;
  int max_segments, max_slots;
  Segment* segments;  // [max_segments]
  Slots* slots;       // [experts]
};

// One warp, 32 experts at a time.
static __global__ void plan_segments(Groups g) {
  const int lane = threadIdx.x;
  int first_segment = 0, first_slot = 0;
  for (int base = 0; base < g.experts; base += 32) {
    const int e = base + lane;
    int begin = 0, count = 0, end = 0;
    if (e < g.experts) {
      begin = min(max(g.offsets[e], 0), g.tokens);
      end = max(min(g.offsets[e + 1], g.tokens), begin);
      count = max((end - begin + g.length - 1) / g.length, 1);
    }
    const int slots = count > 1 ? count : 0;
    int segments_to = count, slots_to = slots;  // running sums over the lanes
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int a = __shfl_up_sync(~0u, segments_to, offset), b = __shfl_up_sync(~0u, slots_to, offset);
      if (lane >= offset) segments_to += a, slots_to += b;
    }
    const int segment = first_segment + segments_to - count, slot = first_slot + slots_to - slots;
    if (e < g.experts) {
      // Overlapping groups could ask for more than there is: what does not fit is left out.
      const bool fits = segment + count <= g.max_segments && slot + slots <= g.max_slots;
      g.slots[e] = {slot, fits ? slots : 0};
      for (int i = 0; fits && i < count; ++i)
        g.segments[segment + i] = {e, begin + i * g.length, min(begin + (i + 1) * g.length, end), slots > 0 ? slot + i : -1};
    }
    first_segment += __shfl_sync(~0u, segments_to, 31);
    first_slot += __shfl_sync(~0u, slots_to, 31);
  }
  for (int i = first_segment + lane; i < g.max_segments; i += 32) g.segments[i].expert = -1;
}

}  // namespace effcore::cuda::kronecker
