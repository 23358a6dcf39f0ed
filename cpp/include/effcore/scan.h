// Causal depthwise convolution and the selective scan (Mamba-1) over the tokens of x [B, tokens, channels].
//
// With `offsets` int32 [S + 1] the batch has one row of S sequences, [offsets[s], offsets[s + 1]), that know nothing of each
// other; without it there are S = B. Tensors of rows have any strides as long as the last dimension is contiguous. States and
// sums are float32 (float64 for float64 tensors). Two calls give the same bits, whatever the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "effcore/tensor.h"
#include "effcore/threads.h"

namespace effcore::scan {

constexpr std::int64_t least_width = 2, most_width = 8, most_states = 256, most_keep = std::int64_t{1} << 31;

// out[t] = act(bias + sum_k weight[:, k] x[t - K + 1 + k]); the K - 1 tokens before the first are initial_state's, or zero.
struct CausalConv {
  TensorView x;
  TensorView weight;                          // [channels, K], in x's dtype or in float32
  const TensorView* bias = nullptr;           // [channels]
  const TensorView* initial_state = nullptr;  // [S, K - 1, channels] in x's dtype
  const TensorView* offsets = nullptr;
  bool silu = false;
  TensorView out;
};

struct CausalConvBackward {
  CausalConv forward;  // out: as in the forward, not read
  TensorView dout;
  TensorView dx;
  void* dweight = nullptr;         // [channels, K] float32 (float64)
  void* dbias = nullptr;           // [channels], or null
  TensorView* dinitial = nullptr;  // [S, K - 1, channels], or null
};

// dt' = softplus?(dt + dt_bias);  h[t] = exp(dt'[t] A) h[t - 1] + dt'[t] B[t] x[t];  y[t] = C[t] . h[t] + D x[t];
// out = y silu(z)
struct Scan {
  TensorView x, dt;               // [B, tokens, channels]
  TensorView A;                   // [channels, N], in x's dtype or in float32
  TensorView B, C;                // [B, tokens, N]
  const TensorView* D = nullptr;  // [channels], in x's dtype or in float32
  const TensorView* z = nullptr;  // as x
  const TensorView* dt_bias = nullptr;
  const TensorView* initial_state = nullptr;  // [S, channels, N] float32 (float64)
  const TensorView* offsets = nullptr;
  bool softplus = false;
  TensorView out;
  void* final_state = nullptr;  // [S, channels, N], contiguous
  // The state before each `keep` tokens of a sequence, [kept_states(...), N, channels], for the backward; null: not kept.
  void* states = nullptr;
  std::int64_t keep = 0;
};

// The backward goes through the tokens in pieces of `keep`, last piece first, and recomputes a piece's states from the kept
// one before it.
struct ScanBackward {
  Scan forward;  // out, final_state: not read; states: as the forward left them
  TensorView dout;
  const void* dfinal = nullptr;  // [S, channels, N] contiguous, or null
  TensorView dx, ddt, dB, dC;    // contiguous
  TensorView* dz = nullptr;      // where z is given
  // float32 (float64); null where the forward had none
  void* dA = nullptr;        // [channels, N]
  void* dD = nullptr;        // [channels]
  void* ddt_bias = nullptr;  // [channels]
  void* dinitial = nullptr;  // [S, channels, N] or null
};

// One token a row: x, dt, z [B, channels]; B, C [B, N].
struct Step {
  TensorView state;  // [B, channels, N] float32 (float64)
  TensorView x, dt, A, B, C;
  const TensorView* D = nullptr;
  const TensorView* z = nullptr;
  const TensorView* dt_bias = nullptr;
  bool softplus = false;
  TensorView out;             // [B, channels]
  void* new_state = nullptr;  // [B, channels, N], contiguous
};

inline std::int64_t sequences(const TensorView& x, const TensorView* offsets) {
  return offsets != nullptr ? offsets->size[0] - 1 : x.size[0];
}

// Rows of `states`: sequence s begins at row offsets[s] / keep + s (s * ceil(tokens / keep) without offsets), which leaves room
// for each sequence's last piece; rows of no sequence are zero.
inline std::int64_t kept_states(const TensorView& x, const TensorView* offsets, std::int64_t keep) {
  const std::int64_t tokens = x.size[1];
  return offsets != nullptr ? tokens / keep + sequences(x, offsets) : x.size[0] * ((tokens + keep - 1) / keep);
}

// Checks: all throw std::invalid_argument with `function` in front. Values of offsets are read on the CPU alone.
void check_conv(const char* function, const CausalConv& args);
void check_scan(const char* function, const Scan& args);
void check_step(const char* function, const Step& args);
// A contiguous tensor of states, in float32 (float64) and on the device of `like`.
void check_state(const char* function, const char* argument, const TensorView& state, const TensorView& like,
                 std::int64_t batch, std::int64_t channels, std::int64_t states);

void causal_conv(const CausalConv& args, const Threads& threads);
void causal_conv_backward(const CausalConvBackward& args, const Threads& threads);
void selective_scan(const Scan& args, const Threads& threads);
void selective_scan_backward(const ScanBackward& args, const Threads& threads);
void selective_step(const Step& args, const Threads& threads);

}  // namespace effcore::scan
