// The one tensor type of the core: a borrowed, strided block of memory. No ownership, no torch, no Python.
#pragma once
#include <cstdint>

namespace effcore {

enum class DType : std::int8_t { float32, float64, bfloat16, float16, int32, other };
enum class DeviceKind : std::int8_t { cpu, cuda, other };

constexpr int max_rank = 5;

// Plain data, so that it can be handed to a CUDA kernel by value and used in units compiled for one instruction set.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::other;
  DeviceKind device = DeviceKind::other;
  int device_index = 0;
  int rank = 0;
  std::int64_t size[max_rank] = {};
  std::int64_t stride[max_rank] = {};  // in elements
};

}  // namespace effcore
