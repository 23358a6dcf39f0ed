// Exact selection in a row of scores. No branch depends on a score: a misprediction a token costs more than moving the tokens.
//
// A score becomes an integer of the same order (NaN the least, protected tokens the greatest). The key of the last token that
// stays is found bit by bit, from the highest, by counting the keys that are not below a candidate: 32 passes over a row in
// the first-level cache, each of n / width comparisons. One more pass writes both lists: the tokens above that key, and of
// those equal to it the first few.
#pragma once
#include <cstdint>

namespace effcore::routing::EFFCORE_ISA {
namespace {

template <class T>
struct KeyOf {
  using type = std::int32_t;
  using Unsigned = std::uint32_t;
};
template <>
struct KeyOf<double> {
  using type = std::int64_t;
  using Unsigned = std::uint64_t;
};

template <class T>
struct Selection {
  using Key = typename KeyOf<T>::type;
  using Unsigned = typename KeyOf<T>::Unsigned;
  static constexpr int bits = 8 * sizeof(Key);
  static constexpr Unsigned sign = Unsigned{1} << (bits - 1);
  static constexpr Key least = static_cast<Key>(sign), greatest = static_cast<Key>(sign - 1);

  static Key key_of(T score) {
    score += T{0};  // -0 and 0 are equal
    Key key;
    __builtin_memcpy(&key, &score, sizeof key);
    key ^= (key >> (bits - 1)) & greatest;
    return score == score ? key : least;
  }

  // `keys` [tokens] is scratch memory; kept [keep] and rest [tokens - keep] get ascending tokens.
  static void run(const void* scores_, std::int64_t tokens, std::int64_t keep, std::int64_t protect, void* keys_,
                  std::int32_t* kept, std::int32_t* rest) {
    const auto* scores = static_cast<const T*>(scores_);
    auto* const keys = static_cast<Key*>(keys_);
    for (std::int64_t n = 0; n < tokens; ++n) keys[n] = key_of(scores[n]);
    for (std::int64_t n = 0; n < protect; ++n) keys[n] = greatest;
    Key last = least;
    for (int bit = bits - 1; bit >= 0; --bit) {
      const Key candidate = static_cast<Key>(static_cast<Unsigned>(last) + (Unsigned{1} << bit));
      Key count = 0;
      for (std::int64_t n = 0; n < tokens; ++n) count += keys[n] >= candidate;
      last = count >= keep ? candidate : last;
    }
    std::int64_t equal = keep;  // tokens with the last key that stay
    for (std::int64_t n = 0; n < tokens; ++n) equal -= keys[n] > last;
    std::int32_t* lists[2] = {rest, kept};
    for (std::int64_t n = 0; n < tokens; ++n) {
      const bool tie = (keys[n] == last) & (equal > 0);
      equal -= tie;
      *lists[(keys[n] > last) | tie]++ = static_cast<std::int32_t>(n);
    }
  }
};

}  // namespace
}  // namespace effcore::routing::EFFCORE_ISA
