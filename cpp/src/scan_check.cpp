// Which arguments the scan family takes. Everything is refused here, by name, before a kernel runs.
#include "effcore/error.h"
#include "effcore/routing.h"
#include "effcore/scan.h"

namespace effcore::scan {

using effcore::check;
using routing::check_rows, routing::check_weight;

namespace {

void check_offsets(const char* function, const TensorView& offsets, const TensorView& x) {
  check(offsets.dtype == DType::int32, function, "offsets must be int32 (.int() converts) but is ", name(offsets.dtype));
  check(offsets.device == x.device && offsets.device_index == x.device_index, function, "offsets is on ", place(offsets),
        " but x is on ", place(x));
  check(offsets.rank == 1 && offsets.size[0] >= 2, function, "offsets must have shape [sequences + 1] but has ",
        shape(offsets));
  check(offsets.stride[0] == 1, function, "offsets must be contiguous");
  check(x.size[0] == 1, function, "x must have one row of packed sequences where offsets are given, got ", x.size[0]);
  if (x.device != DeviceKind::cpu) return;
  const auto* const at = static_cast<const std::int32_t*>(offsets.data);
  const std::int64_t last = offsets.size[0] - 1;
  check(at[0] == 0, function, "offsets[0] must be 0 but is ", at[0]);
  for (std::int64_t s = 0; s < last; ++s)
    check(at[s] <= at[s + 1], function, "offsets must not fall, but offsets[", s, "] is ", at[s], " and offsets[", s + 1,
          "] is ", at[s + 1]);
  check(at[last] == x.size[1], function, "offsets[", last, "] must be the ", x.size[1], " tokens of x but is ", at[last]);
}

// A matrix of parameters: x's dtype or float32, rows contiguous.
void check_matrix(const char* function, const char* argument, const TensorView& t, const TensorView& x, std::int64_t channels,
                  const char* columns, std::int64_t least, std::int64_t most) {
  check(t.dtype == x.dtype || (t.dtype == DType::float32 && x.dtype != DType::float64), function, argument, " is ",
        name(t.dtype), " but must be ", name(x.dtype), " or float32");
  check(t.device == x.device && t.device_index == x.device_index, function, argument, " is on ", place(t), " but x is on ",
        place(x));
  check(t.rank == 2 && t.size[0] == channels, function, argument, " must have shape [", channels, ", ", columns, "] but has ",
        shape(t));
  check(t.size[1] >= least && t.size[1] <= most, function, argument, " has ", t.size[1], ' ', columns, " but ", least, " to ",
        most, " are supported");
  check(contiguous_last(t), function, argument, " must be contiguous in its last dimension but has stride ", t.stride[1],
        " there");
}

DType state_type(const TensorView& x) {
  return x.dtype == DType::float64 ? DType::float64 : DType::float32;
}

void check_channels(const char* function, const char* argument, const TensorView* t, const TensorView& x) {
  if (t != nullptr) check_weight(function, argument, *t, x);
}

// [B, n] as [B, 1, n], so that the checks of rows serve a step too.
TensorView as_rows(const char* function, const char* argument, const TensorView& t) {
  check(t.rank == 2, function, argument, " must have 2 dimensions [batch, channels] but has shape ", shape(t));
  TensorView rows = t;
  rows.rank = 3;
  rows.size[1] = 1, rows.size[2] = t.size[1];
  rows.stride[1] = t.stride[0], rows.stride[2] = t.stride[1];
  return rows;
}

}  // namespace

void check_state(const char* function, const char* argument, const TensorView& state, const TensorView& like,
                 std::int64_t batch, std::int64_t channels, std::int64_t states) {
  check(state.dtype == state_type(like), function, argument, " is ", name(state.dtype), " but must be ",
        name(state_type(like)));
  check(state.device == like.device && state.device_index == like.device_index, function, argument, " is on ", place(state),
        " but x is on ", place(like));
  check_sizes(function, argument, state, {batch, channels, states});
  std::int64_t step = 1;
  for (int d = 2; d >= 0; --d) {
    check(state.size[d] <= 1 || state.stride[d] == step || batch * channels * states == 0, function, argument,
          " must be contiguous");
    step *= state.size[d];
  }
}

void check_conv(const char* function, const CausalConv& args) {
  const TensorView& x = args.x;
  check_rows(function, "x", x, nullptr);
  check_matrix(function, "weight", args.weight, x, x.size[2], "taps", least_width, most_width);
  check_channels(function, "bias", args.bias, x);
  if (args.offsets != nullptr) check_offsets(function, *args.offsets, x);
  if (args.initial_state != nullptr) {
    check_rows(function, "initial_state", *args.initial_state, &x);
    check_sizes(function, "initial_state", *args.initial_state,
                {sequences(x, args.offsets), args.weight.size[1] - 1, x.size[2]});
  }
}

void check_scan(const char* function, const Scan& args) {
  const TensorView& x = args.x;
  check_rows(function, "x", x, nullptr);
  check_rows(function, "dt", args.dt, &x);
  check_sizes(function, "dt", args.dt, {x.size[0], x.size[1], x.size[2]});
  check_matrix(function, "A", args.A, x, x.size[2], "states", 1, most_states);
  check_rows(function, "B", args.B, &x);
  check_sizes(function, "B", args.B, {x.size[0], x.size[1], args.A.size[1]});
  check_rows(function, "C", args.C, &x);
  check_sizes(function, "C", args.C, {x.size[0], x.size[1], args.A.size[1]});
  check_channels(function, "D", args.D, x);
  if (args.z != nullptr) {
    check_rows(function, "z", *args.z, &x);
    check_sizes(function, "z", *args.z, {x.size[0], x.size[1], x.size[2]});
  }
  check_channels(function, "dt_bias", args.dt_bias, x);
  if (args.offsets != nullptr) check_offsets(function, *args.offsets, x);
  if (args.initial_state != nullptr)
    check_state(function, "initial_state", *args.initial_state, x, sequences(x, args.offsets), x.size[2], args.A.size[1]);
}

void check_step(const char* function, const Step& args) {
  const TensorView x = as_rows(function, "x", args.x), dt = as_rows(function, "dt", args.dt);
  const TensorView B = as_rows(function, "B", args.B), C = as_rows(function, "C", args.C);
  TensorView z;
  Scan scan{x, dt, args.A, B, C, args.D};
  if (args.z != nullptr) {
    z = as_rows(function, "z", *args.z);
    scan.z = &z;
  }
  scan.dt_bias = args.dt_bias;
  check_scan(function, scan);
  check_state(function, "state", args.state, args.x, x.size[0], x.size[2], args.A.size[1]);
}

}  // namespace effcore::scan
