// What the kernels of the scan family share: tensors of tokens, chunks of sequences, the functions of dt and of the gates, and
// sums over chunks.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/element.cuh"
#include "common/error.h"
#include "effcore/cuda/scan.h"
#include "routing/rows.cuh"

namespace effcore::cuda::scan {

using routing::element_bytes;
using routing::grid;
using routing::refuse_float64;
using routing::Rows;
using routing::rows_of;
using routing::with_type;

constexpr int threads = 128;  // of a block: a channel (or a part of its states) each

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// A vector or matrix of parameters, in T or in float.
struct Parameter {
  const void* data = nullptr;  // null: absent
  std::int64_t stride = 0;     // elements between channels
  bool is_float = false;

  template <class T>
  __device__ float at(std::int64_t channel, std::int64_t column = 0) const {
    const std::int64_t i = channel * stride + column;
    return is_float ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
  }
};
inline Parameter parameter_of(const TensorView* t) {
  return t != nullptr ? Parameter{t->data, t->stride[0], t->dtype == DType::float32} : Parameter{};
}
inline Rows optional_rows(const TensorView* t) {
  return t != nullptr ? rows_of(*t) : Rows{};
}

// The first or the second of a word's two elements; of bfloat16, in one instruction.
template <class T>
__device__ __forceinline__ float half_of(std::uint32_t word, int i) {
  if constexpr (std::is_same_v<T, bf16>)
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  else
    return i == 0 ? unpack<T>(word).x : unpack<T>(word).y;
}

// n neighbouring elements of a row, as they lie in memory: they are taken apart only where they are used, so that loads stay
// under way until then.
template <class T, int n>
struct alignas(sizeof(T) * n >= 16 ? 16
               : sizeof(T) * n < 4 ? 4
                                   : sizeof(T) * n) Run {
  static constexpr int per_word = 4 / sizeof(T), words = (n + per_word - 1) / per_word;
  std::uint32_t word[words];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (per_word == 1)
      return __uint_as_float(word[i]);
    else
      return half_of<T>(word[i / 2], i % 2);
  }
  __device__ __forceinline__ static Run of(const float (&x)[n]) {
    Run run;
#pragma unroll
    for (int i = 0; i < words; ++i) {
      if constexpr (per_word == 1)
        run.word[i] = __float_as_uint(x[i]);
      else
        run.word[i] = pack<T>(x[2 * i], 2 * i + 1 < n ? x[2 * i + 1] : 0.0f);
    }
    return run;
  }
};

// Elements [c, c + n) of a row of `size`; zeros behind its end. vector: all of them lie in the row, or none, at an address that
// one access takes.
template <int n, class T>
__device__ __forceinline__ Run<T, n> load_run(const T* row, int c, int size, bool vector) {
  using R = Run<T, n>;
  R run{};
  if (vector && n >= R::per_word) {
    if (c < size) run = *reinterpret_cast<const R*>(row + c);
    return run;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (c + i >= size) break;
    if constexpr (R::per_word == 1)
      run.word[i] = reinterpret_cast<const std::uint32_t*>(row)[c + i];
    else
      run.word[i / 2] |= std::uint32_t{reinterpret_cast<const std::uint16_t*>(row)[c + i]} << (16 * (i % 2));
  }
  return run;
}
template <class T, int n>
__device__ __forceinline__ void store_run(T* row, const Run<T, n>& run, int c, int size, bool vector) {
  if (vector && n >= Run<T, n>::per_word) {
    if (c < size) *reinterpret_cast<Run<T, n>*>(row + c) = run;
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (c + i >= size) break;
    if constexpr (sizeof(T) == 4)
      reinterpret_cast<std::uint32_t*>(row)[c + i] = run.word[i];
    else
      reinterpret_cast<std::uint16_t*>(row)[c + i] = static_cast<std::uint16_t>(run.word[i / 2] >> (16 * (i % 2)));
  }
}

// Sequences are cut into chunks of `length` tokens, each a block's (a row of blocks along the channels). As there may be packed
// sequences whose lengths only the device knows, chunks are numbered like kept states: a sequence's begin at row
// offsets[s] / length + s, and rows in between that belong to none have nothing to do.
struct Chunks {
  const std::int32_t* offsets;  // null: each row of the batch is a sequence
  int sequences, tokens, length, rows;
  int per_sequence;  // without offsets

  struct Chunk {
    int sequence, begin, end;  // tokens; a sequence without tokens has one chunk without tokens
    std::int64_t batch;
    int sequence_begin, sequence_end, first_row;
    __device__ bool first() const { return begin == sequence_begin; }
    __device__ bool last() const { return end == sequence_end; }
  };

  __device__ int begin_of(int s) const { return offsets != nullptr ? offsets[s] : 0; }
  __device__ int end_of(int s) const { return offsets != nullptr ? offsets[s + 1] : tokens; }
  __device__ int first_row(int s) const { return offsets != nullptr ? offsets[s] / length + s : s * per_sequence; }

  // False where the row belongs to no sequence.
  __device__ bool find(int row, Chunk& c) const {
    int s = row / per_sequence;
    if (offsets != nullptr) {
      int low = 0, high = sequences - 1;  // the last sequence whose first row is not above this one
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_row(middle) <= row)
          low = middle;
        else
          high = middle - 1;
      }
      s = low;
    }
    c.sequence = s;
    c.batch = offsets != nullptr ? 0 : s;
    c.sequence_begin = begin_of(s), c.sequence_end = end_of(s), c.first_row = first_row(s);
    const int i = row - c.first_row;
    c.begin = c.sequence_begin + i * length;
    c.end = min(c.begin + length, c.sequence_end);
    return i == 0 || c.begin < c.sequence_end;
  }
};

inline Chunks chunks_of(const TensorView& x, const TensorView* offsets, std::int64_t length) {
  Chunks c{};
  c.offsets = offsets != nullptr ? static_cast<const std::int32_t*>(offsets->data) : nullptr;
  c.sequences = static_cast<int>(effcore::scan::sequences(x, offsets));
  c.tokens = static_cast<int>(x.size[1]), c.length = static_cast<int>(length);
  c.per_sequence = static_cast<int>(std::max<std::int64_t>(ceil_div(x.size[1], length), 1));
  c.rows = static_cast<int>(offsets != nullptr ? x.size[1] / length + c.sequences : std::int64_t{c.sequences} * c.per_sequence);
  return c;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Both values are made and one is taken: a branch would keep what stands around it apart.
__device__ __forceinline__ float select(bool which, float yes, float no) {
  float x;
  asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
      : "=f"(x)
      : "f"(yes), "f"(no), "r"(static_cast<int>(which)));
  return x;
}

// By the accurate exponential: its error would be that of a whole token.
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_approx(1.0f + expf(-x));  // e^-x = inf gives 0
}

// Of a gate whose product is rounded to T at once: to 2 bytes the fast exponential, whose error is a part in 10^6, does.
template <class T>
__device__ __forceinline__ float gate_sigmoid(float x) {
  return sizeof(T) == 2 ? reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x)) : sigmoid(x);
}

// log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|; log1p(e) / e on [0, 1] by a polynomial of relative error 5e-9. Not by the
// fast logarithm, whose error of 4e-7 is 2e-5 of a step size of 0.02.
__device__ __forceinline__ float softplus(float x) {
  const float e = expf(-fabsf(x));
  float ratio = -0.0032439841888844967f;
  ratio = ratio * e + 0.019851282238960266f;
  ratio = ratio * e - 0.056959208101034164f;
  ratio = ratio * e + 0.1060362309217453f;
  ratio = ratio * e - 0.15305574238300323f;
  ratio = ratio * e + 0.19675934314727783f;
  ratio = ratio * e - 0.24954132735729218f;
  ratio = ratio * e + 0.3332996368408203f;
  ratio = ratio * e - 0.4999990165233612f;
  ratio = ratio * e + 1.0f;
  return (x > 0.0f ? x : 0.0f) + ratio * e;
}

// The same of a step size that came in 2 bytes: a relative error of 2e-6 is a thousandth of its rounding.
template <class T>
__device__ __forceinline__ float softplus_of(float x) {
  if constexpr (sizeof(T) == 4) return softplus(x);
  const float e = exp2_approx(-1.44269504f * fabsf(x));
  float ratio = 0.014202825725078583f;
  ratio = ratio * e - 0.06658805161714554f;
  ratio = ratio * e + 0.14943458139896393f;
  ratio = ratio * e - 0.23514863848686218f;
  ratio = ratio * e + 0.3311205208301544f;
  ratio = ratio * e - 0.4998719096183777f;
  ratio = ratio * e + 0.9999987483024597f;
  return fmaxf(x, 0.0f) + ratio * e;  // a NaN is in e
}

constexpr float log2_e = 1.44269504088896340736f, ln_2 = 0.693147180559945309417f;

// to[c, k] = sum over rows of partial[row][k][c], for k < columns
void sum_parameters(const char* function, float* to, const float* partial, int rows, std::int64_t row_stride,
                    std::int64_t channels, int columns, cudaStream_t stream);

}  // namespace effcore::cuda::scan
