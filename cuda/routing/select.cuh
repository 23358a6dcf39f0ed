// An exact selection by one block: the `keep` tokens with the greatest keys, ties to the lower index, both lists in ascending
// order.
//
// A score becomes an unsigned integer of the same order (NaN 0, protected tokens the greatest). The key T of the last token
// that stays is found eight bits at a time, from the highest: the block counts how many of the keys that agree with T so far go
// on with each digit, and each warp finds T's. Then the tokens are walked through in order, a block's width at a time, and each
// finds its place from how many before it are above T and how many equal it. The only atomics are counts, whose order does not
// matter; nothing is sorted.
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

// The key of the last of `keep` tokens, at least 1, and how many of those with this key are among them.
__device__ __forceinline__ std::uint32_t last_key(const std::uint32_t* keys, int tokens, int keep, int& ties) {
  constexpr int digits = 256, own = digits / 32;
  __shared__ __align__(16) std::uint32_t counts[4][digits];
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < 4 * digits; i += blockDim.x) counts[i / digits][i % digits] = 0;
  __syncthreads();
  std::uint32_t last = 0, left = keep;
#pragma unroll
  for (int round = 0; round < 4; ++round) {
    const int shift = 24 - 8 * round;
    for (int n = threadIdx.x; n < tokens; n += blockDim.x) {
      const std::uint32_t key = keys[n];
      if (round == 0 || key >> (shift + 8) == last >> (shift + 8)) atomicAdd(&counts[round][key >> shift & (digits - 1)], 1u);
    }
    __syncthreads();
    // A lane takes eight digits, lane 0 the greatest ones: which lane's digits does the count reach `left` in, and which digit?
    const int first = digits - own * (lane + 1);
    const uint4 low = *reinterpret_cast<const uint4*>(&counts[round][first]),
                high = *reinterpret_cast<const uint4*>(&counts[round][first + 4]);
    const std::uint32_t mine[own] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
    std::uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < own; ++i) sum += mine[i];
    std::uint32_t through = sum;  // of this lane's digits and all greater ones
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint32_t other = __shfl_up_sync(~0u, through, offset);
      if (lane >= offset) through += other;
    }
    const int reaching = __ffs(__ballot_sync(~0u, through >= left)) - 1;
    std::uint32_t above = through - sum;
    int digit = first + own - 1;
#pragma unroll
    for (int i = 0; i < own - 1; ++i)
      if (above + mine[i] < left && digit == first + own - 1 - i) above += mine[i], --digit;
    last |= static_cast<std::uint32_t>(__shfl_sync(~0u, digit, reaching)) << shift;
    left -= __shfl_sync(~0u, above, reaching);
  }
  ties = static_cast<int>(left);
  return last;
}

// keys [tokens] in shared or global memory, visible to the whole block. All threads of the block call it.
__device__ __forceinline__ void select(const std::uint32_t* keys, int tokens, int keep, std::int32_t* kept,
                                       std::int32_t* rest) {
  const int width = blockDim.x, lane = threadIdx.x % 32;
  const std::uint32_t before = (1u << lane) - 1;
  std::uint32_t last = ~0u;
  int ties = 0;  // of the tokens with the last key, so many stay
  if (keep > 0) last = last_key(keys, tokens, keep, ties);
  int parity = 0;
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
