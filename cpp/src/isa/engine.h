// An engine is the arithmetic under the algorithms of attention_forward.cpp and attention_backward.cpp: what operands look
// like and how blocks of them are multiplied. Simd takes any dtype and computes in float (double for float64).
#pragma once
#include "product.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

// Right operands are packed in panels of `panel` columns, their steps padded with zeros to a multiple of `steps`; left operands
// are row-major with rows padded likewise, except that Simd reads transposed ones where they lie.
template <class S, class T>
struct Simd {
  using Storage = S;      // of the tensors
  using Accumulator = T;  // of scores, sums and statistics
  using Operand = T;      // of the products
  using Tiles = VectorTiles<T>;
  static constexpr std::int64_t panel = attention::EFFCORE_ISA::panel<T>, steps = 1;
  static constexpr std::int64_t row_block = 128;      // query rows of a task; a multiple of probs_tile
  static constexpr std::int64_t forward_keys = 512;   // keys between two updates of the running maximum
  static constexpr std::int64_t backward_keys = 128;  // keys of a block of dS

  struct Session {};  // held while a task multiplies

  static void multiply(const Product<T>& p) { multiply_blocks<Tiles>(p); }

  static void pack_rows(T* packed, std::int64_t depth, std::int64_t first, const Storage* from, std::int64_t row_stride,
                        std::int64_t rows, std::int64_t n, std::int64_t valid_begin, std::int64_t valid_end) {
    attention::EFFCORE_ISA::pack_rows(packed, depth, first, from, row_stride, rows, n, valid_begin, valid_end);
  }
  static void pack_transposed(T* packed, std::int64_t depth, std::int64_t first, const Storage* from, std::int64_t row_stride,
                              std::int64_t rows, std::int64_t valid_begin, std::int64_t valid_end) {
    attention::EFFCORE_ISA::pack_transposed(packed, depth, first, from, row_stride, rows, valid_begin, valid_end);
  }

  // Makes the transpose of [rows, columns] the left operand.
  static void set_transposed(Product<T>& p, const T* matrix, std::int64_t row_stride, std::int64_t, std::int64_t, T*) {
    p.a = matrix;
    p.a_row = 1;
    p.a_column = row_stride;
  }
  static constexpr std::int64_t transposed_elements = 0;
};

// Steps of a product over n, as operands have them.
template <class E>
constexpr std::int64_t depth(std::int64_t n) {
  return round_up(n, E::steps);
}
// Elements of a packed right operand with n columns and k steps.
template <class E>
constexpr std::int64_t packed_elements(std::int64_t k, std::int64_t n) {
  return round_up(n, E::panel) * depth<E>(k);
}

template <class Storage>
inline const Storage* row_of(const TensorView& t, std::int64_t b, std::int64_t h, std::int64_t i) {
  return static_cast<const Storage*>(t.data) + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
}

// Hands out pieces of one scratch buffer, each on a cache line of its own.
class Pieces {
 public:
  explicit Pieces(char* memory) : next_(memory) {}
  template <class T>
  T* take(std::int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<std::int64_t>(sizeof(T)), 64);
    return piece;
  }
  std::int64_t bytes_from(const char* memory) const { return next_ - memory; }

 private:
  char* next_;
};

// One packing task: a segment of the keys of one kv head of the wave.
struct Segment {
  std::int64_t head;  // within the wave
  std::int64_t batch, kv_head, begin, end;
};
inline Segment segment_of(const Problem& p, const Wave& wave, std::int64_t task) {
  const std::int64_t per_head = (p.keys + wave.pack_segment - 1) / wave.pack_segment;
  const std::int64_t head = task / per_head, begin = task % per_head * wave.pack_segment;
  const std::int64_t number = wave.first + head;
  return {head, number / p.kv_heads, number % p.kv_heads, begin, least(begin + wave.pack_segment, p.keys)};
}

// The keys that some query of row b sees, from the start of a segment.
inline KeyRange valid_keys(const Problem& p, std::int64_t b, std::int64_t segment_begin) {
  if (p.queries == 0) return {0, 0};
  const KeyRange range = visible_keys(p, b, 0, p.queries - 1);
  return {range.begin - segment_begin, range.end - segment_begin};
}

// What rows [first, first + rows) of a block see of the keys [key, key + keys), from `key` on.
struct Visibility {
  std::int32_t* begin;  // [rows]
  std::int32_t* end;    // [rows]
};
inline void look(const Problem& p, std::int64_t b, std::int64_t first, std::int64_t rows, std::int64_t key, std::int64_t keys,
                 const Visibility& v) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const KeyRange range = visible_keys(p, b, first + r);
    v.begin[r] = static_cast<std::int32_t>(most(0, least(range.begin - key, keys)));
    v.end[r] = static_cast<std::int32_t>(most(v.begin[r], least(range.end - key, keys)));
  }
}

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
