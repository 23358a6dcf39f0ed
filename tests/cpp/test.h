// As much of a test framework as these tests need.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "effcore/tensor.h"
#include "effcore/threads.h"

namespace effcore::test {

// Counts, and prints what failed.
void expect(bool condition, const std::string& what);

// At namespace scope: `const Suite suite(run);` adds a file's tests to the program.
struct Suite {
  explicit Suite(void (*run)());
};

inline void on_threads(std::int64_t count, LoopBody body, void* context) {
  std::vector<std::thread> threads;
  for (std::int64_t i = 1; i < count; ++i) threads.emplace_back(body, context, i, i + 1);
  body(context, 0, 1);
  for (std::thread& thread : threads) thread.join();
}
inline const Threads three_threads{3, on_threads};

// bfloat16, as its bits.
struct BFloat16 {
  std::uint16_t bits = 0xffff;  // NaN

  BFloat16() = default;
  explicit BFloat16(float x) {
    const auto wide = std::bit_cast<std::uint32_t>(x);
    bits = static_cast<std::uint16_t>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};

// A dense float32, bfloat16 or int32 tensor, poisoned with NaN (or -1), with one element more behind it.
template <class T>
struct Dense {
  std::vector<T> data;
  TensorView view;

  explicit Dense(const std::vector<std::int64_t>& sizes) {
    std::int64_t count = 1;
    view.dtype = std::is_same_v<T, float> ? DType::float32 : std::is_same_v<T, BFloat16> ? DType::bfloat16 : DType::int32;
    view.device = DeviceKind::cpu;
    view.rank = static_cast<int>(sizes.size());
    for (int d = view.rank - 1; d >= 0; --d) {
      view.size[d] = sizes[d], view.stride[d] = count;
      count *= sizes[d];
    }
    if constexpr (std::is_same_v<T, BFloat16>)
      data.assign(count + 1, T());
    else
      data.assign(count + 1, std::is_same_v<T, float> ? std::numeric_limits<T>::quiet_NaN() : T(-1));
    view.data = data.data();
  }
  Dense(Dense&&) = default;  // moves keep where the elements lie, copies would not
  Dense& operator=(Dense&&) = default;

  double operator[](std::int64_t i) const { return data[i]; }
  T& at(std::int64_t b, std::int64_t n, std::int64_t c = 0) {
    return data[b * view.stride[0] + n * view.stride[1] + (view.rank > 2 ? c : 0)];
  }
  void randomize(std::mt19937& random) {
    for (T& x : data) x = T(static_cast<T>(static_cast<int>(random() % 257) - 128) / 32);
  }
  bool equals(const Dense& other) const { return std::equal(data.begin(), data.end() - 1, other.data.begin()); }
};

}  // namespace effcore::test
