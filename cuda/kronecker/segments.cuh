// How ragged groups become work of even size, on the device: nobody waits to learn how many tokens an expert has.
//
// An expert's tokens are cut into segments of at most `length`; an expert without tokens has one empty segment. A segment that
// is its expert's only one writes the result; others write partial sums into numbered slots, which a second kernel adds up in
// their order: the same sums in every run. Long segments come first, so that none of them begins when the others end: those
// of full length, then the others by falling length, in steps of an eighth of the mean load.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace effcore::cuda::kronecker {

struct Segment {
  int expert;  // -1: no segment
  int begin, end;
  int slot;  // of partial sums; -1: the expert's only segment
};

// Of an expert with several segments, for the sum over them. slots == 0: no such expert.
struct Split {
  int expert, first, slots;
};

struct Groups {
  const std::int32_t* offsets;  // [experts + 1]
  int experts, tokens, length;
  int max_segments, max_splits, max_slots;
  Segment* segments;  // [max_segments]
  Split* splits;      // [max_splits]
  int* drawn;         // pieces of work that blocks have drawn, for those that stay
};

// Sums over the lanes before this one, and adds all lanes to `total`.
__device__ __forceinline__ int count_before(int x, int& total) {
  const int lane = threadIdx.x % 32;
  int to = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, to, offset);
    if (lane >= offset) to += other;
  }
  const int before = total + to - x;
  total += __shfl_sync(~0u, to, 31);
  return before;
}

// One warp, 32 experts at a time.
static __global__ void plan_segments(Groups g) {
  const int lane = threadIdx.x;
  if (lane == 0) *g.drawn = 0;
  const auto tokens_of = [&](int e, int& begin) {
    begin = 0;
    if (e >= g.experts) return 0;
    begin = min(max(g.offsets[e], 0), g.tokens);
    return max(min(g.offsets[e + 1], g.tokens) - begin, 0);
  };
  const int eighth = max(g.tokens / max(8 * g.experts, 1), 1);
  // Lanes whose segment of less than full length is about as long as this lane's; none where it has no such segment.
  const auto alike = [&](int e, int tokens, int& size) {
    const bool has_rest = e < g.experts && (tokens % g.length > 0 || tokens == 0);
    size = min(tokens % g.length / eighth, 31);
    const unsigned lanes = __match_any_sync(~0u, has_rest ? size : -1);
    return has_rest ? lanes : 0u;
  };
  __shared__ int place[32];  // of the next segment of each size
  place[lane] = 0;
  __syncwarp();
  int begin = 0, all_full = 0, size = 0;
  for (int base = 0; base < g.experts; base += 32) {
    const int tokens = tokens_of(base + lane, begin);
    count_before(tokens / g.length, all_full);
    const unsigned lanes = alike(base + lane, tokens, size);
    if (lanes != 0 && lane == __ffs(lanes) - 1) place[size] += __popc(lanes);
    __syncwarp();
  }
  int rest = all_full;
  const int first_of_size = count_before(place[31 - lane], rest);
  __syncwarp();
  place[31 - lane] = first_of_size;
  __syncwarp();

  int full = 0, slots = 0, splits = 0;
  for (int base = 0; base < g.experts; base += 32) {
    const int e = base + lane, tokens = tokens_of(e, begin), end = begin + tokens;
    const int my_full = tokens / g.length;
    const unsigned lanes = alike(e, tokens, size);
    const int my_rest = lanes != 0 ? 1 : 0;
    const int my_slots = my_full + my_rest > 1 ? my_full + my_rest : 0;
    const int first_full = count_before(my_full, full);
    const int first_rest = place[size] + __popc(lanes & ((1u << lane) - 1));
    __syncwarp();
    if (lanes != 0 && lane == __ffs(lanes) - 1) place[size] += __popc(lanes);
    __syncwarp();
    const int first_slot = count_before(my_slots, slots), split = count_before(my_slots > 0, splits);
    // Overlapping groups could ask for more than there is: what does not fit is left out.
    const bool fits = first_full + my_full <= g.max_segments && first_rest + my_rest <= g.max_segments &&
                      first_slot + my_slots <= g.max_slots && split + (my_slots > 0) <= g.max_splits;
    if (my_slots > 0 && split < g.max_splits) g.splits[split] = {e, first_slot, fits ? my_slots : 0};
    for (int i = 0; fits && i < my_full; ++i)
      g.segments[first_full + i] = {e, begin + i * g.length, begin + (i + 1) * g.length, my_slots > 0 ? first_slot + i : -1};
    if (fits && my_rest > 0)
      g.segments[first_rest] = {e, begin + my_full * g.length, end, my_slots > 0 ? first_slot + my_full : -1};
    else if (my_rest > 0 && first_rest < g.max_segments)
      g.segments[first_rest].expert = -1;
    for (int i = 0; !fits && i < my_full && first_full + i < g.max_segments; ++i) g.segments[first_full + i].expert = -1;
  }
  for (int i = rest + lane; i < g.max_segments; i += 32) g.segments[i].expert = -1;
  for (int i = splits + lane; i < g.max_splits; i += 32) g.splits[i].slots = 0;
}

}  // namespace effcore::cuda::kronecker
