// An exact selection by one block: the `keep` tokens with the greatest keys, ties to the lower index, both lists in ascending
// order.
//
// A score becomes an unsigned integer of the same order (NaN 0, protected tokens the greatest). The key T of the last token
// that stays is found bit by bit, from the highest: 32 counts of the block. Then the tokens are walked through in order, a
// block's width at a time, and each finds its place from how many before it are above T and how many equal it. No atomics, no
// sort.
#pragma once
#include <cstdint>

namespace effcore::cuda::routing {

constexpr int most_select_threads = 1024;

__device__ __forceinline__ std::uint32_t key_of(float score, bool is_protected) {
  if (is_protected) return ~0u;
  if (score != score) return 0;
  const std::uint32_t bits = __float_as_uint(score + 0.0f);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sums of `value` over the warps before this one, and over all. `parity` alternates from call to call, so that one barrier
// is enough.
__device__ __forceinline__ uint2 sums_of_warps(std::uint32_t value, int parity) {
  __shared__ std::uint32_t partial[2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) partial[parity][warp] = value;
  __syncthreads();
  const std::uint32_t mine = lane < warps ? partial[parity][lane] : 0;
  return {__reduce_add_sync(~0u, lane < warp ? mine : 0), __reduce_add_sync(~0u, mine)};
}

// keys [tokens] in shared or global memory, visible to the whole block. All threads of the block call it.
__device__ __forceinline__ void select(const std::uint32_t* keys, int tokens, int keep, std::int32_t* kept,
                                       std::int32_t* rest) {
  const int width = blockDim.x, lane = threadIdx.x % 32;
  const std::uint32_t before = (1u << lane) - 1;
  int parity = 0;
  std::uint32_t last = 0;
  if (keep == 0)
    last = ~0u;
  else if (keep < tokens)
    for (int bit = 31; bit >= 0; --bit, parity ^= 1) {
      const std::uint32_t candidate = last | 1u << bit;
      std::uint32_t count = 0;
      for (int n = threadIdx.x; n < tokens; n += width) count += keys[n] >= candidate;
      if (sums_of_warps(__reduce_add_sync(~0u, count), parity).y >= static_cast<std::uint32_t>(keep)) last = candidate;
    }
  std::uint32_t above = 0;
  for (int n = threadIdx.x; n < tokens; n += width) above += keys[n] > last;
  above = sums_of_warps(__reduce_add_sync(~0u, above), parity).y;
  parity ^= 1;
  const int ties = keep - static_cast<int>(above);  // of the tokens with the last key, so many stay
  int greater_before = 0, equal_before = 0;
  for (int base = 0; base < tokens; base += width, parity ^= 1) {
    const int n = base + threadIdx.x;
    const bool greater = n < tokens && keys[n] > last, equal = n < tokens && keys[n] == last;
    const std::uint32_t greaters = __ballot_sync(~0u, greater), equals = __ballot_sync(~0u, equal);
    // Both counts of a tile in one word: neither exceeds its 1024 tokens.
    const uint2 sums = sums_of_warps(__popc(greaters) << 16 | __popc(equals), parity);
    const int equal_rank = equal_before + static_cast<int>(sums.x & 0xffff) + __popc(equals & before);
    const int place = greater_before + static_cast<int>(sums.x >> 16) + __popc(greaters & before) + min(equal_rank, ties);
    if (n < tokens) {
      if (greater || (equal && equal_rank < ties))
        kept[place] = n;
      else
        rest[n - place] = n;
    }
    greater_before += static_cast<int>(sums.y >> 16);
    equal_before += static_cast<int>(sums.y & 0xffff);
  }
}

}  // namespace effcore::cuda::routing
