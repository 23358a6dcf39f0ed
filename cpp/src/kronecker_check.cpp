// Which arguments the kronecker family takes. Everything is refused here, by name, before a kernel runs.
#include "effcore/error.h"
#include "effcore/kronecker.h"

namespace effcore::kronecker {

using effcore::check;

namespace {

void check_device(const char* function, const char* argument, const TensorView& t, const TensorView& x) {
  check(t.device == x.device && t.device_index == x.device_index, function, argument, " is on ", place(t), " but x is on ",
        place(x));
}

}  // namespace

void check_tokens(const char* function, const TensorView& x, const TensorView& offsets) {
  check(x.device == DeviceKind::cpu || x.device == DeviceKind::cuda, function, "x is on ", name(x.device),
        " but cpu and cuda are supported");
  check(x.dtype == DType::float32 || x.dtype == DType::bfloat16 || x.dtype == DType::float16 ||
            (x.dtype == DType::float64 && x.device == DeviceKind::cpu),
        function, "x is ", name(x.dtype), " but float32, bfloat16, float16 and (on cpu) float64 are supported");
  check(x.rank == 2, function, "x must have 2 dimensions [tokens, features] but has shape ", shape(x));
  check(contiguous_last(x), function, "x must be contiguous in its last dimension but has stride ", x.stride[1], " there");
  check(offsets.dtype == DType::int32, function, "offsets must be int32 (.int() converts) but is ", name(offsets.dtype));
  check_device(function, "offsets", offsets, x);
  check(offsets.rank == 1 && offsets.size[0] >= 1, function,
        "offsets must have shape [experts + 1], the first token of each expert and the end of the last, but has ",
        shape(offsets));
  check(offsets.size[0] <= 1 || offsets.stride[0] == 1, function, "offsets must be contiguous but has stride ",
        offsets.stride[0]);
  if (x.device != DeviceKind::cpu) return;
  const auto* at = static_cast<const std::int32_t*>(offsets.data);
  for (std::int64_t e = 0; e < offsets.size[0]; ++e) {
    const std::int64_t least = e > 0 ? at[e - 1] : 0;
    check(at[e] >= least && at[e] <= x.size[0], function, "offsets[", e, "] is ", at[e], " but must be from ", least,
          " to the ", x.size[0], " tokens of x");
  }
}

void check_gram(const char* function, const TensorView& out, const TensorView& x, const TensorView& offsets) {
  const std::int64_t experts = offsets.size[0] - 1, dim = x.size[1];
  const DType dtype = x.dtype == DType::float64 ? DType::float64 : DType::float32;
  check(out.dtype == dtype, function, "out is ", name(out.dtype), " but must be ", name(dtype), " for tokens in ",
        name(x.dtype));
  check_device(function, "out", out, x);
  check(out.rank == 3 && out.size[0] == experts && out.size[1] == dim && out.size[2] == dim, function, "out must have shape [",
        experts, ", ", dim, ", ", dim, "] but has ", shape(out));
  const bool empty = experts * dim == 0;
  check(empty || ((dim == 1 || (out.stride[2] == 1 && out.stride[1] == dim)) && (experts == 1 || out.stride[0] == dim * dim)),
        function, "out must be contiguous");
}

}  // namespace effcore::kronecker
