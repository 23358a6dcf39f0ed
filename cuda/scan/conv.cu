// Causal depthwise convolution:  u[t] = bias + sum_k weight[k] x[t - K + 1 + k],  out = u or silu(u), and its gradients
//
//   du = dout act'(u)    dx[t] = sum_k weight[k] du[t + K - 1 - k]    dweight[k] = sum_t du[t] x[t - K + 1 + k]
//
// Bound: bytes, if an element costs at most 30 instructions (backward: 44). A thread walks over a chunk of tokens of two
// neighbouring channels with the last K tokens in registers. The backward walks K - 1 tokens further than its chunk, and makes
// u again.
#include "common/path.h"
#include "scan/common.cuh"

namespace effcore::cuda::scan {
namespace {

constexpr int chunk_tokens = 64, ahead = 8;  // tokens loaded before the first of them is used
constexpr int pair = 2;                      // channels of a thread

struct ConvParams {
  Chunks chunks;
  Rows x, out, initial, dout, dx, dinitial;  // data == nullptr: none
  Parameter weight, bias;
  int channels, taps;
  bool silu, vector;  // vector: pairs of channels may be read and written at once
  float* partial;     // [chunk rows][taps + 1][channels]
};

struct Pair {
  float at[pair];
  Pair() = default;
  template <class T>
  __device__ __forceinline__ Pair(const Run<T, pair>& run) : at{run[0], run[1]} {}
};

template <class T>
__device__ __forceinline__ Run<T, pair> load(const ConvParams& p, const Rows& rows, std::int64_t b, int t, int c) {
  return load_run<pair>(reinterpret_cast<const T*>(rows(b, t)), c, p.channels, p.vector);
}
template <class T>
__device__ __forceinline__ void store(const ConvParams& p, const Rows& rows, std::int64_t b, int t, int c, Pair x) {
  store_run(reinterpret_cast<T*>(rows(b, t)), Run<T, pair>::of(x.at), c, p.channels, p.vector);
}

// A token of x, of the initial state before the sequence, or zero.
template <class T>
__device__ __forceinline__ Run<T, pair> token(const ConvParams& p, const Chunks::Chunk& chunk, int t, int c) {
  if (t >= chunk.sequence_begin) return load<T>(p, p.x, chunk.batch, t, c);
  const int i = t - chunk.sequence_begin + p.taps - 1;
  return p.initial.data != nullptr && i >= 0 ? load<T>(p, p.initial, chunk.sequence, i, c) : Run<T, pair>{};
}

// The last tokens, the youngest at the end.
template <int taps>
struct Window {
  Pair at[taps];

  __device__ __forceinline__ void push(Pair x) {
#pragma unroll
    for (int i = 0; i + 1 < taps; ++i) at[i] = at[i + 1];
    at[taps - 1] = x;
  }
};

template <int taps>
struct Weights {
  float at[pair][taps], bias[pair];

  template <class T>
  __device__ __forceinline__ void load(const ConvParams& p, int c) {
#pragma unroll
    for (int j = 0; j < pair; ++j) {
      const bool valid = c + j < p.channels;
      bias[j] = valid && p.bias.data != nullptr ? p.bias.at<T>(c + j) : 0.0f;
#pragma unroll
      for (int k = 0; k < taps; ++k) at[j][k] = valid ? p.weight.at<T>(c + j, k) : 0.0f;
    }
  }
  __device__ __forceinline__ float u(const Window<taps>& window, int j) const {
    float sum = bias[j];
#pragma unroll
    for (int k = 0; k < taps; ++k) sum += at[j][k] * window.at[k].at[j];
    return sum;
  }
};

template <class T, int taps>
__device__ __forceinline__ Window<taps> window_before(const ConvParams& p, const Chunks::Chunk& chunk, int c) {
  Window<taps> window;
#pragma unroll
  for (int i = 0; i < taps; ++i) window.at[i] = i > 0 ? token<T>(p, chunk, chunk.begin - taps + i, c) : Run<T, pair>{};
  return window;
}

template <class T, int taps>
__global__ void __launch_bounds__(threads) conv_kernel(const __grid_constant__ ConvParams p) {
  Chunks::Chunk chunk;
  const int blocks = (p.channels + pair * threads - 1) / (pair * threads);
  const int c = (blockIdx.x % blocks * threads + threadIdx.x) * pair;
  if (!p.chunks.find(blockIdx.x / blocks, chunk) || c >= p.channels) return;
  Weights<taps> weights;
  weights.template load<T>(p, c);
  auto window = window_before<T, taps>(p, chunk, c);
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += ahead) {
    Run<T, pair> x[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) x[i] = t0 + i < chunk.end ? load<T>(p, p.x, chunk.batch, t0 + i, c) : Run<T, pair>{};
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      window.push(x[i]);
      Pair out;
#pragma unroll
      for (int j = 0; j < pair; ++j) {
        const float u = weights.u(window, j);
        out.at[j] = p.silu ? u * sigmoid(u) : u;
      }
      if (t0 + i < chunk.end) store<T>(p, p.out, chunk.batch, t0 + i, c, out);
    }
  }
}

template <class T, int taps>
__global__ void __launch_bounds__(threads) conv_backward_kernel(const __grid_constant__ ConvParams p) {
  constexpr int halo = taps - 1;
  Chunks::Chunk chunk;
  const int blocks = (p.channels + pair * threads - 1) / (pair * threads), row = blockIdx.x / blocks;
  const int c = (blockIdx.x % blocks * threads + threadIdx.x) * pair;
  if (c >= p.channels) return;
  float dweight[pair][taps] = {}, dbias[pair] = {};
  if (p.chunks.find(row, chunk)) {
    Weights<taps> weights;
    weights.template load<T>(p, c);
    auto window = window_before<T, taps>(p, chunk, c);
    Window<taps> grads{};  // the last du
    for (int t0 = chunk.begin; t0 < chunk.end + halo; t0 += ahead) {
      Run<T, pair> x[ahead], g[ahead];
      const int inside = min(chunk.end + halo, chunk.sequence_end);
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        x[i] = t0 + i < inside ? load<T>(p, p.x, chunk.batch, t0 + i, c) : Run<T, pair>{};
        g[i] = t0 + i < inside ? load<T>(p, p.dout, chunk.batch, t0 + i, c) : Run<T, pair>{};
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const int t = t0 + i, at = t - halo;
        window.push(x[i]);
        Pair du, dx{};
#pragma unroll
        for (int j = 0; j < pair; ++j) {
          du.at[j] = g[i][j];
          if (p.silu) {
            const float u = weights.u(window, j), gate = sigmoid(u);
            du.at[j] *= gate * (1.0f + u * (1.0f - gate));
          }
          if (t >= chunk.sequence_end) du.at[j] = 0.0f;
        }
        grads.push(du);
        if (t < chunk.end) {
#pragma unroll
          for (int j = 0; j < pair; ++j) {
            dbias[j] += du.at[j];
#pragma unroll
            for (int k = 0; k < taps; ++k) dweight[j][k] += du.at[j] * window.at[k].at[j];
          }
        }
#pragma unroll
        for (int j = 0; j < pair; ++j)
#pragma unroll
          for (int k = 0; k < taps; ++k) dx.at[j] += weights.at[j][k] * grads.at[taps - 1 - k].at[j];
        if (at >= chunk.begin && at < chunk.end)
          store<T>(p, p.dx, chunk.batch, at, c, dx);
        else if (at < chunk.begin && chunk.first() && p.dinitial.data != nullptr && t < chunk.begin + halo)
          store<T>(p, p.dinitial, chunk.sequence, at - chunk.begin + halo, c, dx);
      }
    }
  }
  float* const to = p.partial + std::int64_t{row} * (taps + 1) * p.channels + c;
#pragma unroll
  for (int j = 0; j < pair; ++j) {
    if (c + j >= p.channels) break;
#pragma unroll
    for (int k = 0; k < taps; ++k) to[std::int64_t{k} * p.channels + j] = dweight[j][k];
    to[std::int64_t{taps} * p.channels + j] = dbias[j];
  }
}

// Calls body(std::integral_constant<int, taps>{}).
template <class Body, int taps = effcore::scan::least_width>
void with_taps(int count, Body&& body) {
  if constexpr (taps < effcore::scan::most_width) {
    if (count > taps) return with_taps<Body, taps + 1>(count, std::forward<Body>(body));
  }
  body(std::integral_constant<int, taps>{});
}

bool pairs_aligned(const TensorView* t) {
  if (t == nullptr) return true;
  const std::int64_t size = element_bytes(t->dtype);
  return reinterpret_cast<std::uintptr_t>(t->data) % (pair * size) == 0 && t->stride[0] % pair == 0 &&
         t->stride[1] % pair == 0 && t->size[2] % pair == 0;
}

ConvParams params_of(const CausalConv& args) {
  ConvParams p{chunks_of(args.x, args.offsets, chunk_tokens), rows_of(args.x)};
  p.initial = optional_rows(args.initial_state);
  p.weight = parameter_of(&args.weight), p.bias = parameter_of(args.bias);
  p.channels = static_cast<int>(args.x.size[2]), p.taps = static_cast<int>(args.weight.size[1]);
  p.silu = args.silu, p.vector = pairs_aligned(&args.x) && pairs_aligned(args.initial_state);
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
  p.out = rows_of(args.out), p.vector = p.vector && pairs_aligned(&args.out);
  with_type(args.x.dtype, f, [&]<class T>(T) {
    with_taps(p.taps, [&]<int taps>(std::integral_constant<int, taps>) {
      launch(f, conv_kernel<T, taps>, grid(p.chunks.rows * ceil_div(p.channels, pair * threads), f), threads, 0,
             static_cast<cudaStream_t>(to.stream), p);
    });
  });
}

void causal_conv_backward(const CausalConvBackward& args, const Launch& to) {
  const char* f = "causal_conv1d_bwd";
  refuse_float64(args.forward.x.dtype, f);
  ConvParams p = params_of(args.forward);
  if (p.channels == 0) return;
  const auto stream = static_cast<cudaStream_t>(to.stream);
  p.dout = rows_of(args.dout), p.dx = rows_of(args.dx), p.dinitial = optional_rows(args.dinitial);
  p.vector = p.vector && pairs_aligned(&args.dout) && pairs_aligned(&args.dx) && pairs_aligned(args.dinitial);
  p.partial = static_cast<float*>(to.workspace);
  if (p.chunks.rows > 0)
    with_type(args.forward.x.dtype, f, [&]<class T>(T) {
      with_taps(p.taps, [&]<int taps>(std::integral_constant<int, taps>) {
        launch(f, conv_backward_kernel<T, taps>, grid(p.chunks.rows * ceil_div(p.channels, pair * threads), f), threads, 0,
               stream, p);
      });
    });
  const std::int64_t stride = std::int64_t{p.taps + 1} * p.channels;
  sum_parameters(f, static_cast<float*>(args.dweight), p.partial, p.chunks.rows, stride, p.channels, p.taps, stream);
  sum_parameters(f, static_cast<float*>(args.dbias), p.partial + std::int64_t{p.taps} * p.channels, p.chunks.rows, stride,
                 p.channels, 1, stream);
}

const char* path(DType dtype) {
  const char* none = path_refusal(dtype);
  return none != nullptr ? none : "sm_80";
}

}  // namespace effcore::cuda::scan
