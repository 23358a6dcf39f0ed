// An exact selection by one block: the `keep` tokens with the greatest keys, ties to the lower index, both lists in ascending
// order.
//
// A score becomes an unsigned integer of the same order (NaN 0, protected tokens the greatest). The least key that stays is
// found by counting: the range that the keys have is cut into 256 equal parts at most, the one with the last key that stays
// again, and so on, until a part is one key or all that are left stay. Four rounds are enough for any 32 bits. Each warp then
// takes tokens that follow each other, and they find their places from how many before them stay. The only atomics are
// counts, whose order does not matter; nothing is sorted.
#pragma once
#include <cstdint>

namespace effcore::cuda::routing {

__device__ __forceinline__ std::uint32_t key_of(float score, bool is_protected) {
  if (is_protected) return ~0u;
  if (score != score) return 0;
  const std::uint32_t bits = __float_as_uint(score + 0.0f);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Tokens with keys above `last` stay, and the first `ties` of those that equal it.
struct Threshold {
  std::uint32_t last;
  int ties;
};

// Of the `keep` greatest keys, at least 1. Called by all threads of the block.
__device__ __forceinline__ Threshold threshold_of(const std::uint32_t* keys, int tokens, int keep) {
  constexpr int digit_bits = 8, digits = 1 << digit_bits, own = digits / 32;
  __shared__ __align__(16) std::uint32_t counts[4][digits];
  __shared__ std::uint32_t lows[32], highs[32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, threads = blockDim.x, warps = threads / 32;
  std::uint32_t low = ~0u, high = 0;
  for (int n = thread; n < tokens; n += threads) low = min(low, keys[n]), high = max(high, keys[n]);
  low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
  if (lane == 0) lows[warp] = low, highs[warp] = high;
  for (int i = thread; i < 4 * digits; i += threads) counts[i / digits][i % digits] = 0;
  __syncthreads();
  low = __reduce_min_sync(~0u, lane < warps ? lows[lane] : ~0u);
  high = __reduce_max_sync(~0u, lane < warps ? highs[lane] : 0);
  std::uint32_t left = keep, span = high - low;  // the key that is sought is in [low, low + span]
  int shift = 32 - __clz(static_cast<int>(span));
#pragma unroll
  for (int round = 0; round < 4; ++round) {
    shift = max(shift - digit_bits, 0);
    for (int n = thread; n < tokens; n += threads)
      if (const std::uint32_t key = keys[n]; key >= low && key - low <= span)
        atomicAdd(&counts[round][(key - low) >> shift], 1u);
    __syncthreads();
    // A lane takes eight parts, lane 0 the greatest ones: in which lane's does the count reach `left`, and in which of them?
    const int first = digits - own * (lane + 1);
    const uint4 x = *reinterpret_cast<const uint4*>(&counts[round][first]),
                y = *reinterpret_cast<const uint4*>(&counts[round][first + 4]);
    const std::uint32_t mine[own] = {y.w, y.z, y.y, y.x, x.w, x.z, x.y, x.x};
    std::uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < own; ++i) sum += mine[i];
    std::uint32_t through = sum;  // of this lane's parts and all greater ones
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint32_t other = __shfl_up_sync(~0u, through, offset);
      if (lane >= offset) through += other;
    }
    const int reaching = __ffs(__ballot_sync(~0u, through >= left)) - 1;
    std::uint32_t above = through - sum, here = mine[0];
    int part = first + own - 1;
#pragma unroll
    for (int i = 0; i < own - 1; ++i)
      if (part == first + own - 1 - i && above + mine[i] < left) above += mine[i], here = mine[i + 1], --part;
    low += static_cast<std::uint32_t>(__shfl_sync(~0u, part, reaching)) << shift;
    left -= __shfl_sync(~0u, above, reaching);
    if (shift == 0) break;
    if (__shfl_sync(~0u, here, reaching) == left) return {low, tokens};  // all that are left stay, whatever their keys
    span = (1u << shift) - 1;
  }
  return {low, static_cast<int>(left)};
}

// keys [tokens] in shared or global memory, visible to the whole block; the first `protect` are the greatest there can be. All
// threads of the block call it.
__device__ __forceinline__ void select(const std::uint32_t* keys, int tokens, int keep, int protect, std::int32_t* kept,
                                       std::int32_t* rest) {
  __shared__ int greaters[32], equals[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const std::uint32_t before = (1u << lane) - 1;
  Threshold to{~0u, protect};
  if (keep > protect) to = threshold_of(keys + protect, tokens - protect, keep - protect);
  // First each warp counts, then all know where each begins.
  const int own = (tokens + 32 * warps - 1) / (32 * warps) * 32, begin = min(warp * own, tokens),
            end = min(begin + own, tokens);
  int greater = 0, equal = 0;
  for (int n = begin + lane; n < end; n += 32) greater += keys[n] > to.last, equal += keys[n] == to.last;
  greater = __reduce_add_sync(~0u, greater), equal = __reduce_add_sync(~0u, equal);
  if (lane == 0) greaters[warp] = greater, equals[warp] = equal;
  __syncthreads();
  greater = __reduce_add_sync(~0u, lane < warp ? greaters[lane] : 0);
  equal = __reduce_add_sync(~0u, lane < warp ? equals[lane] : 0);
  for (int base = begin; base < end; base += 32) {
    const int n = base + lane;
    const bool above = n < end && keys[n] > to.last, same = n < end && keys[n] == to.last;
    const std::uint32_t all_above = __ballot_sync(~0u, above), all_same = __ballot_sync(~0u, same);
    const int rank = equal + __popc(all_same & before);
    const int place = greater + __popc(all_above & before) + min(rank, to.ties);
    if (n < end) {
      if (above || (same && rank < to.ties))
        kept[place] = n;
      else
        rest[n - place] = n;
    }
    greater += __popc(all_above), equal += __popc(all_same);
  }
}

}  // namespace effcore::cuda::routing
