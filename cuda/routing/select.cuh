// An exact selection by one block: the `keep` tokens with the greatest keys, ties to the lower index, both lists in ascending
// order.
//
// A score becomes an unsigned integer of the same order (NaN 0, protected tokens the greatest). The least key that stays is
// found by counting: the range that the keys have is cut into 256 equal parts at most, the one with the last key that stays
// again, and so on, until a part is one key or all that are left stay. Four rounds are enough for any 32 bits. A warp's tokens
// follow each other, and they find their places from how many before them stay. The only atomics are counts, whose order does
// not matter; nothing is sorted.
#pragma once
#include <cstdint>

namespace effcore::cuda::routing {

__device__ __forceinline__ std::uint32_t key_of(float score, bool is_protected) {
  if (is_protected) return ~0u;
  if (score != score) return 0;
  const std::uint32_t bits = __float_as_uint(score + 0.0f);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The keys of a warp's tokens, which every pass goes over: the first ones of a lane stay in registers.
struct OwnKeys {
  static constexpr int in_registers = 8;
  const std::uint32_t* keys;
  int tokens, begin, count;  // a lane's tokens are begin, begin + 32, ...
  std::uint32_t first[in_registers];

  __device__ __forceinline__ OwnKeys(const std::uint32_t* keys, int tokens) : keys(keys), tokens(tokens) {
    count = (tokens + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
    begin = threadIdx.x / 32 * 32 * count + threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < in_registers; ++j) first[j] = j < count ? key(j) : 0;
  }
  __device__ __forceinline__ std::uint32_t key(int j) const { return begin + 32 * j < tokens ? keys[begin + 32 * j] : 0; }

  // use(token, key) for each, by all lanes together; behind the last token too.
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) const {
#pragma unroll
    for (int j = 0; j < in_registers; ++j)
      if (j < count) use(begin + 32 * j, first[j]);
    for (int j = in_registers; j < count; ++j) use(begin + 32 * j, key(j));
  }
};

// Tokens with keys above `last` stay, and the first `ties` of those that equal it.
struct Threshold {
  std::uint32_t last;
  int ties;
};

// Of the `keep` greatest keys of the tokens from `from` on, at least 1. Called by all threads of the block.
__device__ __forceinline__ Threshold threshold_of(const OwnKeys& own, int from, int keep) {
  constexpr int digit_bits = 8, digits = 1 << digit_bits, of_lane = digits / 32;
  __shared__ __align__(16) std::uint32_t counts[4][digits];
  __shared__ std::uint32_t lows[32], highs[32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32;
  std::uint32_t low = ~0u, high = 0;
  own.each([&](int n, std::uint32_t key) {
    if (n >= from && n < own.tokens) low = min(low, key), high = max(high, key);
  });
  low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
  if (lane == 0) lows[warp] = low, highs[warp] = high;
  for (int i = thread; i < 4 * digits; i += blockDim.x) counts[i / digits][i % digits] = 0;
  __syncthreads();
  low = __reduce_min_sync(~0u, lane < warps ? lows[lane] : ~0u);
  high = __reduce_max_sync(~0u, lane < warps ? highs[lane] : 0);
  std::uint32_t left = keep, span = high - low;  // the key that is sought is in [low, low + span]
  int shift = 32 - __clz(static_cast<int>(span));
#pragma unroll 1
  for (int round = 0; round < 4; ++round) {
    shift = max(shift - digit_bits, 0);
    own.each([&](int n, std::uint32_t key) {
      if (n >= from && n < own.tokens && key >= low && key - low <= span) atomicAdd(&counts[round][(key - low) >> shift], 1u);
    });
    __syncthreads();
    // A lane takes eight parts, lane 0 the greatest ones: in which lane's does the count reach `left`, and in which of them?
    const int first = digits - of_lane * (lane + 1);
    const uint4 x = *reinterpret_cast<const uint4*>(&counts[round][first]),
                y = *reinterpret_cast<const uint4*>(&counts[round][first + 4]);
    const std::uint32_t mine[of_lane] = {y.w, y.z, y.y, y.x, x.w, x.z, x.y, x.x};
    std::uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < of_lane; ++i) sum += mine[i];
    std::uint32_t through = sum;  // of this lane's parts and all greater ones
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint32_t other = __shfl_up_sync(~0u, through, offset);
      if (lane >= offset) through += other;
    }
    const int reaching = __ffs(__ballot_sync(~0u, through >= left)) - 1;
    std::uint32_t above = through - sum, here = mine[0];
    int part = first + of_lane - 1;
#pragma unroll
    for (int i = 0; i < of_lane - 1; ++i)
      if (part == first + of_lane - 1 - i && above + mine[i] < left) above += mine[i], here = mine[i + 1], --part;
    low += static_cast<std::uint32_t>(__shfl_sync(~0u, part, reaching)) << shift;
    left -= __shfl_sync(~0u, above, reaching);
    if (shift == 0) break;
    if (__shfl_sync(~0u, here, reaching) == left) return {low, own.tokens};  // all that are left stay, whatever their keys
    span = (1u << shift) - 1;
  }
  return {low, static_cast<int>(left)};
}

// keys [tokens] in shared or global memory, visible to the whole block; the first `protect` are the greatest there can be. All
// threads of the block call it.
__device__ __forceinline__ void select(const std::uint32_t* keys, int tokens, int keep, int protect, std::int32_t* kept,
                                       std::int32_t* rest) {
  __shared__ int greaters[32], equals[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t before = (1u << lane) - 1;
  const OwnKeys own(keys, tokens);
  const Threshold to = keep > protect ? threshold_of(own, protect, keep - protect) : Threshold{~0u, protect};
  // First each warp counts, then all know where each begins.
  int greater = 0, equal = 0;
  own.each([&](int n, std::uint32_t key) { greater += n < tokens && key > to.last, equal += n < tokens && key == to.last; });
  greater = __reduce_add_sync(~0u, greater), equal = __reduce_add_sync(~0u, equal);
  if (lane == 0) greaters[warp] = greater, equals[warp] = equal;
  __syncthreads();
  greater = __reduce_add_sync(~0u, lane < warp ? greaters[lane] : 0);
  equal = __reduce_add_sync(~0u, lane < warp ? equals[lane] : 0);
  own.each([&](int n, std::uint32_t key) {
    const bool above = n < tokens && key > to.last, same = n < tokens && key == to.last;
    const std::uint32_t all_above = __ballot_sync(~0u, above), all_same = __ballot_sync(~0u, same);
    const int rank = equal + __popc(all_same & before);
    const int place = greater + __popc(all_above & before) + min(rank, to.ties);
    if (n < tokens) {
      if (above || (same && rank < to.ties))
        kept[place] = n;
      else
        rest[n - place] = n;
    }
    greater += __popc(all_above), equal += __popc(all_same);
  });
}

}  // namespace effcore::cuda::routing
