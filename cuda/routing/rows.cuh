// Rows of tensors in bytes, lists of tokens, and 16-byte accesses to rows of any length at any address.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/element.cuh"
#include "common/error.h"
#include "effcore/routing.h"

namespace effcore::cuda::routing {

// [B, tokens, channels]; `end` is behind the last byte that belongs to the tensor.
struct Rows {
  char* data;
  std::int64_t batch, token;  // strides in bytes
  const char* end;

  __device__ char* operator()(std::int64_t b, std::int64_t n) const { return data + b * batch + n * token; }
};

struct List {
  const std::int32_t* data;
  std::int64_t batch, place;  // strides in elements

  __device__ std::int32_t operator()(std::int64_t b, std::int64_t i) const { return data[b * batch + i * place]; }
};

inline int element_bytes(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

inline Rows rows_of(const TensorView& t) {
  const std::int64_t size = element_bytes(t.dtype);
  Rows rows{static_cast<char*>(t.data), t.stride[0] * size, t.stride[1] * size, nullptr};
  std::int64_t bytes = t.size[2] * size;
  for (int d = 0; d < 2; ++d) bytes += std::max<std::int64_t>(t.size[d] - 1, 0) * t.stride[d] * size;
  rows.end = rows.data + bytes;
  return rows;
}

inline List list_of(const TensorView& t) {
  return {static_cast<const std::int32_t*>(t.data), t.stride[0], t.stride[1]};
}

// Whether each row begins at a multiple of 16 bytes and is a multiple of 16 bytes long.
inline bool aligned(const TensorView& t) {
  const std::int64_t size = element_bytes(t.dtype);
  bool all = reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && t.size[2] * size % 16 == 0;
  for (int d = 0; d < 2; ++d) all = all && (t.size[d] <= 1 || t.stride[d] * size % 16 == 0);
  return all;
}

inline unsigned grid(std::int64_t blocks, const char* function) {
  if (blocks > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::string("effcore.") + function + ": " + std::to_string(blocks) +
                                " blocks are more than CUDA takes");
  return static_cast<unsigned>(blocks);
}

inline void refuse_float64(DType dtype, const char* function) {
  if (dtype == DType::float64)
    throw std::invalid_argument(std::string("effcore.") + function +
                                ": float64 runs on the CPU alone; on a GPU use float32, bfloat16 or float16");
}

// Calls body(T{}) with the element type of a tensor.
template <class Body>
void with_type(DType dtype, const char* function, Body&& body) {
  refuse_float64(dtype, function);
  if (dtype == DType::bfloat16)
    body(bf16{});
  else if (dtype == DType::float16)
    body(fp16{});
  else
    body(float{});
}

// What is read once goes past the first-level cache.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}

// What a neighbouring lane reads too stays in the first-level cache.
__device__ __forceinline__ uint4 load_shared(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}

// Bytes [shift, shift + 16) of the 32 bytes low, high; shift is even, from 0 to 14.
__device__ __forceinline__ uint4 realign(uint4 low, uint4 high, int shift) {
  std::uint32_t w[6] = {low.x, low.y, low.z, low.w, high.x, high.y};
  const std::uint32_t tail[2] = {high.z, high.w};
  if (shift & 8) w[0] = w[2], w[1] = w[3], w[2] = w[4], w[3] = w[5], w[4] = tail[0], w[5] = tail[1];
  if (shift & 4) w[0] = w[1], w[1] = w[2], w[2] = w[3], w[3] = w[4], w[4] = w[5];
  const int bits = (shift & 3) * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// A row at any address (a multiple of 2), and the memory of its tensor, which loads stay within.
struct Source {
  const char *row, *begin, *end;

  // 16 bytes of the row, put together from two aligned loads.
  __device__ __forceinline__ uint4 load(int at) const {
    const char* const p = row + at;
    const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(p) & 15);
    if (shift == 0) return load_once(p);
    const char* const low = p - shift;
    if (low >= begin && low + 32 <= end) return realign(load_shared(low), load_shared(low + 16), shift);
    const auto* const pairs = reinterpret_cast<const std::uint16_t*>(p);
    const auto word = [&](int i) { return pairs[2 * i] | static_cast<std::uint32_t>(pairs[2 * i + 1]) << 16; };
    return {word(0), word(1), word(2), word(3)};
  }
};

inline __device__ Source source_of(const Rows& rows, std::int64_t b, std::int64_t n) {
  return {rows(b, n), rows.data, rows.end};
}

// One warp writes a row of any length at any address: vector(at) where 16 bytes are aligned, element(at) of `size` bytes before
// and behind.
template <class Vectors, class Elements>
__device__ __forceinline__ void write_row(char* to, int bytes, int size, int lane, const Vectors& vector,
                                          const Elements& element) {
  const int head = min(static_cast<int>(-reinterpret_cast<std::uintptr_t>(to) & 15), bytes);
  const int chunks = (bytes - head) / 16, tail = head + chunks * 16;
  if (size * lane < head) element(size * lane);
  if (tail + size * lane < bytes) element(tail + size * lane);
#pragma unroll 4
  for (int chunk = lane; chunk < chunks; chunk += 32)
    *reinterpret_cast<uint4*>(to + head + chunk * 16) = vector(head + chunk * 16);
}

__device__ __forceinline__ void copy_row(char* to, const Source& from, int bytes, int lane) {
  write_row(
      to, bytes, 2, lane, [&](int at) { return from.load(at); },
      [&](int at) { *reinterpret_cast<std::uint16_t*>(to + at) = *reinterpret_cast<const std::uint16_t*>(from.row + at); });
}

// 16 bytes of T as floats, and back.
template <class T>
struct Vector {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  float x[size];

  __device__ __forceinline__ static Vector from(uint4 bits) {
    Vector v;
    const T* p = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < size; ++i) v.x[i] = to_float(p[i]);
    return v;
  }
  __device__ __forceinline__ uint4 bits() const {
    uint4 out;
    T* p = reinterpret_cast<T*>(&out);
#pragma unroll
    for (int i = 0; i < size; ++i) p[i] = from_float<T>(x[i]);
    return out;
  }
};

// to = a + b + c, where b and c are given, rounded once.
template <class T>
__device__ __forceinline__ void sum_row(char* to, const Source& a, const Source& b, const Source& c, int bytes, int lane) {
  const auto vector = [&](int at) {
    auto sum = Vector<T>::from(a.load(at));
    const auto add = [&](const Source& other) {
      if (other.row == nullptr) return;
      const auto y = Vector<T>::from(other.load(at));
#pragma unroll
      for (int i = 0; i < Vector<T>::size; ++i) sum.x[i] += y.x[i];
    };
    add(b), add(c);
    return sum.bits();
  };
  const auto element = [&](int at) {
    float sum = to_float(*reinterpret_cast<const T*>(a.row + at));
    if (b.row != nullptr) sum += to_float(*reinterpret_cast<const T*>(b.row + at));
    if (c.row != nullptr) sum += to_float(*reinterpret_cast<const T*>(c.row + at));
    *reinterpret_cast<T*>(to + at) = from_float<T>(sum);
  };
  write_row(to, bytes, static_cast<int>(sizeof(T)), lane, vector, element);
}

}  // namespace effcore::cuda::routing
