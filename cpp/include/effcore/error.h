// Bad arguments: one way to refuse them, with a message that names the function, the argument, what was expected and what came.
#pragma once
#include <sstream>
#include <stdexcept>

#include "effcore/tensor.h"

namespace effcore {

const char* name(DType dtype);
const char* name(DeviceKind device);

template <class... Parts>
[[noreturn]] void fail(const char* function, const Parts&... parts) {
  std::ostringstream text;
  text << "effcore." << function << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool condition, const char* function, const Parts&... parts) {
  if (!condition) [[unlikely]] fail(function, parts...);
}

}  // namespace effcore
