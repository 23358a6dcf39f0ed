// Causal depthwise convolution:  u[t] = bias + sum_k weight[k] x[t - K + 1 + k],  out = u or silu(u), and its gradients
//
//   du = dout act'(u)    dx[t] = sum_k weight[k] du[t + K - 1 - k]    dweight[k] = sum_t du[t] x[t - K + 1 + k]
//
// Bound: bytes. A thread walks over a chunk of tokens of one channel with the last 8 tokens in registers, so that a warp reads
// neighbouring channels of a token; weights of fewer than 8 taps stand at the end of 8, behind zeros. The backward walks K - 1
// tokens further than its chunk, and makes u again.
#include "scan/common.cuh"

namespace effcore::cuda::scan {
namespace {

constexpr int most_taps = 8, chunk_tokens = 64, ahead = 8;  // tokens loaded before the first of them is used
static_assert(most_taps == effcore::scan::most_width);

struct ConvParams {
  Chunks chunks;
  Rows x, out, initial, dout, dx, dinitial;  // data == nullptr: none
  Parameter weight, bias;
  int channels, taps;
  bool silu;
  float* partial;  // [chunk rows][taps + 1][channels]
};

template <class T>
__device__ __forceinline__ float load(const Rows& rows, std::int64_t b, int t, int c) {
  return to_float(reinterpret_cast<const T*>(rows(b, t))[c]);
}
template <class T>
__device__ __forceinline__ void store(const Rows& rows, std::int64_t b, int t, int c, float x) {
  reinterpret_cast<T*>(rows(b, t))[c] = from_float<T>(x);
}

// A token of x, of the initial state before the sequence, or zero.
template <class T>
__device__ __forceinline__ float token(const ConvParams& p, const Chunks::Chunk& chunk, int t, int c) {
  if (t >= chunk.sequence_begin) return load<T>(p.x, chunk.batch, t, c);
  const int i = t - chunk.sequence_begin + p.taps - 1;
  return p.initial.data != nullptr && i >= 0 ? load<T>(p.initial, chunk.sequence, i, c) : 0.0f;
}

__device__ __forceinline__ void push(float (&window)[most_taps], float x) {
#pragma unroll
  for (int i = 0; i + 1 < most_taps; ++i) window[i] = window[i + 1];
  window[most_taps - 1] = x;
}

template <class T>
__device__ __forceinline__ void load_weight(float (&weight)[most_taps], const ConvParams& p, int c) {
#pragma unroll
  for (int i = 0; i < most_taps; ++i) {
    const int k = i - (most_taps - p.taps);
    weight[i] = k >= 0 ? p.weight.at<T>(c, k) : 0.0f;
  }
}

__device__ __forceinline__ float product(const float (&weight)[most_taps], const float (&window)[most_taps], float sum) {
#pragma unroll
  for (int i = 0; i < most_taps; ++i) sum += weight[i] * window[i];
  return sum;
}

// NaN times a zero weight would be NaN: the window holds no token older than taps - 1.
template <class T>
__device__ __forceinline__ void load_window(float (&window)[most_taps], const ConvParams& p, const Chunks::Chunk& chunk,
                                            int c) {
#pragma unroll
  for (int i = 0; i < most_taps; ++i) {
    const int back = most_taps - i - 1;  // the youngest has back == 0: the token before the chunk
    window[i] = back < p.taps - 1 ? token<T>(p, chunk, chunk.begin - 1 - back, c) : 0.0f;
  }
}
__device__ __forceinline__ void forget(float (&window)[most_taps], int taps) {
#pragma unroll
  for (int i = 0; i < most_taps; ++i)
    if (i < most_taps - taps) window[i] = 0.0f;
}

template <class T>
__global__ void __launch_bounds__(threads) conv_kernel(const __grid_constant__ ConvParams p) {
  Chunks::Chunk chunk;
  const int blocks = static_cast<int>(ceil_div(p.channels, threads)), c = blockIdx.x % blocks * threads + threadIdx.x;
  if (!p.chunks.find(blockIdx.x / blocks, chunk) || c >= p.channels) return;
  float weight[most_taps], window[most_taps];
  load_weight<T>(weight, p, c);
  load_window<T>(window, p, chunk, c);
  const float bias = p.bias.data != nullptr ? p.bias.at<T>(c) : 0.0f;
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += ahead) {
    float x[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) x[i] = t0 + i < chunk.end ? load<T>(p.x, chunk.batch, t0 + i, c) : 0.0f;
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      push(window, x[i]);
      forget(window, p.taps);
      float u = product(weight, window, bias);
      if (p.silu) u *= sigmoid(u);
      if (t0 + i < chunk.end) store<T>(p.out, chunk.batch, t0 + i, c, u);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads) conv_backward_kernel(const __grid_constant__ ConvParams p) {
  Chunks::Chunk chunk;
  const int blocks = static_cast<int>(ceil_div(p.channels, threads)), c = blockIdx.x % blocks * threads + threadIdx.x;
  const int row = blockIdx.x / blocks;
  if (c >= p.channels) return;
  float dweight[most_taps] = {}, dbias = 0.0f;
  if (p.chunks.find(row, chunk)) {
    float weight[most_taps], window[most_taps], grads[most_taps] = {};  // the last du
    load_weight<T>(weight, p, c);
    load_window<T>(window, p, chunk, c);
    const float bias = p.bias.data != nullptr ? p.bias.at<T>(c) : 0.0f;
    const int halo = p.taps - 1;
    for (int t0 = chunk.begin; t0 < chunk.end + halo; t0 += ahead) {
      float x[ahead], g[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const bool inside = t0 + i < chunk.end + halo && t0 + i < chunk.sequence_end;
        x[i] = inside ? load<T>(p.x, chunk.batch, t0 + i, c) : 0.0f;
        g[i] = inside ? load<T>(p.dout, chunk.batch, t0 + i, c) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const int t = t0 + i;
        push(window, x[i]);
        forget(window, p.taps);
        float du = g[i];
        if (p.silu) {
          const float u = product(weight, window, bias), gate = sigmoid(u);
          du *= gate * (1.0f + u * (1.0f - gate));
        }
        if (t >= chunk.sequence_end) du = 0.0f;
        if (t < chunk.end) {
#pragma unroll
          for (int k = 0; k < most_taps; ++k) dweight[k] += du * window[k];
          dbias += du;
        }
        push(grads, du);
        float dx = 0.0f;  // of token t - halo: weight[k] meets the du of k tokens ago
#pragma unroll
        for (int k = 0; k < most_taps; ++k)
          if (k >= most_taps - p.taps) dx += weight[k] * grads[most_taps - 1 - (k - (most_taps - p.taps))];
        const int at = t - halo;
        if (at >= chunk.begin && at < chunk.end)
          store<T>(p.dx, chunk.batch, at, c, dx);
        else if (at < chunk.begin && chunk.first() && p.dinitial.data != nullptr && t < chunk.begin + halo)
          store<T>(p.dinitial, chunk.sequence, at - chunk.begin + halo, c, dx);
      }
    }
  }
  float* const to = p.partial + std::int64_t{row} * (p.taps + 1) * p.channels + c;
#pragma unroll
  for (int i = 0; i < most_taps; ++i) {
    const int k = i - (most_taps - p.taps);
    if (k >= 0) to[std::int64_t{k} * p.channels] = dweight[i];
  }
  to[std::int64_t{p.taps} * p.channels] = dbias;
}

ConvParams params_of(const CausalConv& args) {
  ConvParams p{chunks_of(args.x, args.offsets, chunk_tokens), rows_of(args.x)};
  p.initial = optional_rows(args.initial_state);
  p.weight = parameter_of(&args.weight), p.bias = parameter_of(args.bias);
  p.channels = static_cast<int>(args.x.size[2]), p.taps = static_cast<int>(args.weight.size[1]);
  p.silu = args.silu;
  return p;
}

}  // namespace

std::size_t workspace_bytes(const CausalConv&) {
  return 0;
}
std::size_t workspace_bytes(const CausalConvBackward& args) {
  const ConvParams p = params_of(args.forward);
  return std::size_t(p.chunks.rows) * (p.taps + 1) * p.channels * sizeof(float);
}

void causal_conv(const CausalConv& args, const Launch& to) {
  const char* f = "causal_conv1d";
  refuse_float64(args.x.dtype, f);
  ConvParams p = params_of(args);
  if (std::int64_t{p.channels} * p.chunks.sequences * p.chunks.tokens == 0) return;
  p.out = rows_of(args.out);
  with_type(args.x.dtype, f, [&]<class T>(T) {
    launch(f, conv_kernel<T>, grid(p.chunks.rows * ceil_div(p.channels, threads), f), threads, 0,
           static_cast<cudaStream_t>(to.stream), p);
  });
}

void causal_conv_backward(const CausalConvBackward& args, const Launch& to) {
  const char* f = "causal_conv1d_bwd";
  refuse_float64(args.forward.x.dtype, f);
  ConvParams p = params_of(args.forward);
  if (p.channels == 0) return;
  const auto stream = static_cast<cudaStream_t>(to.stream);
  p.dout = rows_of(args.dout), p.dx = rows_of(args.dx), p.dinitial = optional_rows(args.dinitial);
  p.partial = static_cast<float*>(to.workspace);
  if (p.chunks.rows > 0)
    with_type(args.forward.x.dtype, f, [&]<class T>(T) {
      launch(f, conv_backward_kernel<T>, grid(p.chunks.rows * ceil_div(p.channels, threads), f), threads, 0, stream, p);
    });
  const std::int64_t stride = std::int64_t{p.taps + 1} * p.channels;
  sum_parameters(f, static_cast<float*>(args.dweight), p.partial, p.chunks.rows, stride, p.channels, p.taps, stream);
  sum_parameters(f, static_cast<float*>(args.dbias), p.partial + std::int64_t{p.taps} * p.channels, p.chunks.rows, stride,
                 p.channels, 1, stream);
}

}  // namespace effcore::cuda::scan
