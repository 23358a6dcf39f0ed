#include "effcore/error.h"

#include <cstdio>

namespace effcore {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
    case DType::int32: return "int32";
    case DType::other: break;
  }
  return "an unsupported dtype";
}

const char* name(DeviceKind device) {
  switch (device) {
    case DeviceKind::cpu: return "cpu";
    case DeviceKind::cuda: return "cuda";
    case DeviceKind::other: break;
  }
  return "an unsupported device";
}

void append(std::string& text, const char* part) {
  text += part;
}
void append(std::string& text, char part) {
  text += part;
}
void append(std::string& text, std::int64_t part) {
  text += std::to_string(part);
}

void append(std::string& text, double part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", part);
  text += digits;
}

void append(std::string& text, Place part) {
  text += name(part.device);
  if (part.device == DeviceKind::cpu) return;
  text += ':';
  append(text, part.index);
}

void append(std::string& text, Shape part) {
  text += '[';
  for (int d = 0; d < part.rank; ++d) {
    if (d != 0) text += ", ";
    append(text, part.sizes[d]);
  }
  text += ']';
}

}  // namespace effcore
