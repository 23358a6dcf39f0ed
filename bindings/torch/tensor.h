// torch tensors as the core's views, and the little allocation that the bindings do. LibTorch stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "effcore/error.h"
#include "effcore/tensor.h"

namespace effcore::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Int: return DType::int32;
    default: return DType::other;
  }
}

// Statistics of a softmax (lse, delta, scales) and accumulated gradients are kept in this dtype.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `function` and `argument` name a tensor of too high a rank in the refusal.
inline TensorView view(const Tensor& t, const char* function, const char* argument) {
  TensorView v;
  v.rank = static_cast<int>(t.dim());
  check(v.rank <= max_rank, function, argument, " must have at most ", max_rank, " dimensions, got ", v.rank);
  v.dtype = dtype_of(t.scalar_type());
  v.device = t.is_cpu() ? DeviceKind::cpu : t.is_cuda() ? DeviceKind::cuda : DeviceKind::other;
  v.device_index = t.get_device_index();
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int i = 0; i < v.rank; ++i) {
    v.size[i] = sizes[i];
    v.stride[i] = strides[i];
  }
  v.data = const_cast<void*>(t.const_data_ptr());
  return v;
}

inline Tensor empty_strided(const Tensor& device_of, const std::int64_t* sizes, const std::int64_t* strides, std::int64_t rank,
                            ScalarType dtype) {
  std::int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(device_of.get(), &device_index));
  const auto code = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& device_of, std::initializer_list<std::int64_t> sizes, ScalarType dtype) {
  std::int64_t strides[max_rank];
  std::int64_t step = 1;
  for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<std::int64_t>(sizes.begin()[i], 1);
  }
  return empty_strided(device_of, sizes.begin(), strides, static_cast<std::int64_t>(sizes.size()), dtype);
}

// [B, H, S, D] in the memory order of `like`: a model that views its projections as heads (transpose(1, 2)) gets results
// that it can view back without a copy.
inline Tensor empty_heads(const Tensor& like, std::int64_t batch, std::int64_t heads, std::int64_t tokens, std::int64_t dim,
                          ScalarType dtype) {
  const std::int64_t sizes[] = {batch, heads, tokens, dim};
  const std::int64_t d = std::max<std::int64_t>(dim, 1), h = std::max<std::int64_t>(heads, 1),
                     s = std::max<std::int64_t>(tokens, 1);
  const bool token_major = like.stride(1) < like.stride(2);
  const std::int64_t strides[] = {h * s * d, token_major ? d : s * d, token_major ? h * d : d, 1};
  return empty_strided(like, sizes, strides, 4, dtype);
}

// A tensor of any shape whose elements are all the same one element in memory (stride 0). It carries a gradient between
// two ops (docs/ops.md); nobody reads its value. Not a view: each call owns a storage.
inline Tensor slot(const Tensor& device_of, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  static constexpr std::int64_t strides[max_rank] = {};
  Tensor t = empty_strided(device_of, sizes.data(), strides, static_cast<std::int64_t>(sizes.size()), dtype);
  // On the CPU a defined value costs nothing; on a GPU it would cost a launch for something that is never read.
  if (t.is_cpu() && t.numel() != 0) std::memset(t.mutable_data_ptr(), 0, t.element_size());
  return t;
}

// torch checks only how many arguments an op has; a C++ double where the schema says int would be silent garbage.
template <class T>
struct is_schema_type : std::false_type {};
template <>
struct is_schema_type<Tensor> : std::true_type {};
template <>
struct is_schema_type<bool> : std::true_type {};
template <>
struct is_schema_type<std::int64_t> : std::true_type {};
template <>
struct is_schema_type<double> : std::true_type {};
template <class T>
struct is_schema_type<std::optional<T>> : is_schema_type<T> {};
template <class T>
struct is_schema_type<std::vector<T>> : is_schema_type<T> {};

template <class Result, class... Args>
constexpr bool arguments_fit(Result (*)(Args...)) {
  return (is_schema_type<std::remove_cvref_t<Args>>::value && ...);
}

}  // namespace effcore::binding

#define EFFCORE_IMPL(library, name, function)                                                                       \
  static_assert(effcore::binding::arguments_fit(&function), "an argument's C++ type is not one that a schema has"); \
  library.impl(name, TORCH_BOX(&function))
