// Bad arguments: one way to refuse them, with a message that names the function, the argument, what was expected and what came.
//
// No iostreams: they carry locale state of the C++ library, which breaks where a process holds two copies of it (a wheel with a
// static one beside torch's), and formatting must cost nothing while arguments are good.
#pragma once
#include <concepts>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "effcore/tensor.h"

namespace effcore {

const char* name(DType dtype);
const char* name(DeviceKind device);

// Printed as [2, 3, 5].
struct Shape {
  const std::int64_t* sizes;
  int rank;
};
inline Shape shape(const TensorView& t) {
  return {t.size, t.rank};
}
inline Shape shape(std::initializer_list<std::int64_t> sizes) {
  return {sizes.begin(), static_cast<int>(sizes.size())};
}

// Printed as cpu or cuda:1.
struct Place {
  DeviceKind device;
  int index;
};
inline Place place(const TensorView& t) {
  return {t.device, t.device_index};
}

void append(std::string& text, const char* part);
void append(std::string& text, char part);
void append(std::string& text, std::int64_t part);
void append(std::string& text, double part);
void append(std::string& text, Shape part);
void append(std::string& text, Place part);
inline void append(std::string& text, const std::string& part) {
  text += part;
}
inline void append(std::string& text, std::integral auto part) {
  append(text, static_cast<std::int64_t>(part));
}
inline void append(std::string& text, float part) {
  append(text, static_cast<double>(part));
}

// Whole arguments are formatted here, not before: shape(t), name(t.dtype) and numbers cost nothing to pass along.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* function, const Parts&... parts) {
  std::string text = "effcore.";
  text += function;
  text += ": ";
  (append(text, parts), ...);
  throw std::invalid_argument(text);
}

template <class... Parts>
void check(bool condition, const char* function, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(function, parts...);
}

// The dtypes and devices that most families take.
void check_supported(const char* function, const char* argument, const TensorView& tensor);
void check_sizes(const char* function, const char* argument, const TensorView& tensor,
                 std::initializer_list<std::int64_t> sizes);
// Whether the last dimension is contiguous. Strides of nothing mean nothing: an expanded gradient is contiguous to torch where
// it has no element, and no copy would change its strides.
bool contiguous_last(const TensorView& tensor);

}  // namespace effcore
