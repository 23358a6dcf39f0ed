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

void check_supported(const char* function, const char* argument, const TensorView& t) {
  check(t.device == DeviceKind::cpu || t.device == DeviceKind::cuda, function, argument, " is on ", name(t.device),
        " but cpu and cuda are supported");
  check(t.dtype == DType::float32 || t.dtype == DType::bfloat16 || t.dtype == DType::float16 ||
            (t.dtype == DType::float64 && t.device == DeviceKind::cpu),
        function, argument, " is ", name(t.dtype), " but float32, bfloat16, float16 and (on cpu) float64 are supported");
}

void check_sizes(const char* function, const char* argument, const TensorView& tensor,
                 std::initializer_list<std::int64_t> sizes) {
  bool same = tensor.rank == static_cast<int>(sizes.size());
  for (int d = 0; same && d < tensor.rank; ++d) same = tensor.size[d] == sizes.begin()[d];
  if (same) return;
  fail(function, argument, " must have shape ", shape(sizes), " but has ", shape(tensor));
}

bool contiguous_last(const TensorView& tensor) {
  const int last = tensor.rank - 1;
  if (last < 0 || tensor.size[last] <= 1 || tensor.stride[last] == 1) return true;
  for (int d = 0; d < last; ++d)
    if (tensor.size[d] == 0) return true;
  return false;
}

}  // namespace effcore
