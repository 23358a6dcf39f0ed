#include "effcore/error.h"

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

}  // namespace effcore
