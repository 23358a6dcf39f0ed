// Which arguments a low-rank linear layer takes. Everything is refused here, by name, before a kernel runs.
#include "effcore/error.h"
#include "effcore/lowrank.h"

namespace effcore::lowrank {

using effcore::check;

namespace {

void check_matrix(const char* function, const char* argument, const TensorView& t, const char* sizes) {
  check(t.rank == 2, function, argument, " must have 2 dimensions ", sizes, " but has shape ", shape(t));
  check(contiguous_last(t), function, argument, " must be contiguous in its last dimension but has stride ", t.stride[1],
        " there");
}

void check_same(const char* function, const char* argument, const TensorView& t, const TensorView& like) {
  check(t.dtype == like.dtype, function, argument, " is ", name(t.dtype), " but x is ", name(like.dtype));
  check(t.device == like.device && t.device_index == like.device_index, function, argument, " is on ", place(t),
        " but x is on ", place(like));
}

}  // namespace

void check_linear(const char* function, const TensorView& x, const TensorView& down, const TensorView& up,
                  const TensorView* bias, std::int64_t activation) {
  check(x.device == DeviceKind::cpu || x.device == DeviceKind::cuda, function, "x is on ", name(x.device),
        " but cpu and cuda are supported");
  check(x.dtype == DType::float32 || x.dtype == DType::bfloat16 || x.dtype == DType::float16 ||
            (x.dtype == DType::float64 && x.device == DeviceKind::cpu),
        function, "x is ", name(x.dtype), " but float32, bfloat16, float16 and (on cpu) float64 are supported");
  check_same(function, "down", down, x);
  check_same(function, "up", up, x);
  check_matrix(function, "down", down, "[rank, in]");
  check_matrix(function, "up", up, "[out, rank]");
  check(down.size[1] == x.size[1], function, "down takes ", down.size[1], " features but x has ", x.size[1]);
  check(up.size[1] == down.size[0], function, "up has rank ", up.size[1], " but down has rank ", down.size[0]);
  if (bias != nullptr) {
    check_same(function, "bias", *bias, x);
    check(bias->rank == 1 && bias->size[0] == up.size[0], function, "bias must have shape [", up.size[0], "] but has ",
          shape(*bias));
    check(bias->size[0] <= 1 || bias->stride[0] == 1, function, "bias must be contiguous but has stride ", bias->stride[0]);
  }
  check(activation >= 0 && activation < activations, function, "activation must be a code from 0 to ", activations - 1,
        ", got ", activation);
}

void check_like(const char* function, const char* argument, const TensorView& t, const TensorView& like, std::int64_t rows,
                std::int64_t columns) {
  check_same(function, argument, t, like);
  check(t.rank == 2 && t.size[0] == rows && t.size[1] == columns, function, argument, " must have shape ",
        shape({rows, columns}), " but has ", shape(t));
  check(contiguous_last(t), function, argument, " must be contiguous in its last dimension but has stride ", t.stride[1],
        " there");
}

}  // namespace effcore::lowrank
