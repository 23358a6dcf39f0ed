// The forward of the selective scan, and one step of it.
//
//   h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] B[t],   out[t] = (C[t] . h[t] + D x[t]) silu(z[t])
//
// Bounds: bytes, x, dt, z and out once each (and the kept states, N / keep floats a token and channel); and instructions, a
// special function and four others a token, channel and state, on 16 and 128 lanes of a multiprocessor.
#include "scan/scan.cuh"

namespace effcore::cuda::scan {
namespace {

constexpr int resident = 4;  // blocks of a multiprocessor: 128 registers a thread

// The effect of each chunk but a sequence's last one, from a zero state.
template <class T, int parts>
__global__ void __launch_bounds__(threads) local_kernel(const __grid_constant__ ScanParams p) {
  __shared__ __align__(16) float B[tile * parts * lane_states];
  const Place<parts> at(p);
  Chunks::Chunk chunk;
  if (!p.chunks.find(at.row, chunk) || chunk.last()) return;
  float A[lane_states], h[lane_states] = {}, sum = 0.0f;
  load_rates<T>(A, p, at);
  const float bias = p.bias.data != nullptr ? p.bias.at<T>(at.c) : 0.0f;
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += tile) {
    float x[tile], dt[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      const int t = min(t0 + i, chunk.end - 1);
      x[i] = load<T>(p.x, chunk.batch, t, at.c), dt[i] = load<T>(p.dt, chunk.batch, t, at.c);
    }
    __syncthreads();
    stage<T, parts>(B, p.B, chunk.batch, t0, chunk.end, p.states);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      if (t0 + i >= chunk.end) break;
      float b[lane_states];
      load_states(b, B + (i * parts + at.part) * lane_states);
      const float step = step_size<T>(p, dt[i], bias), dtx = step * x[i];
      sum += step;
#pragma unroll
      for (int n = 0; n < lane_states; ++n) h[n] = exp2_approx(step * A[n]) * h[n] + dtx * b[n];
    }
  }
#pragma unroll
  for (int n = 0; n < lane_states; ++n)
    if (at.has(p, n)) p.carried[by_state(p, at, at.row, n)] = h[n];
  if (at.writes()) p.step_sum[std::int64_t{at.row} * p.channels + at.c] = sum;
}

template <class T, int parts>
__global__ void __launch_bounds__(threads, resident) scan_kernel(const __grid_constant__ ScanParams p) {
  __shared__ __align__(16) float B[tile * parts * lane_states], C[tile * parts * lane_states];
  const Place<parts> at(p);
  Chunks::Chunk chunk;
  if (!p.chunks.find(at.row, chunk)) return;
  float A[lane_states], h[lane_states];
  load_rates<T>(A, p, at);
  load_entering(h, p, at, chunk.sequence);
  const float bias = p.bias.data != nullptr ? p.bias.at<T>(at.c) : 0.0f;
  const float D = p.D.data != nullptr ? p.D.at<T>(at.c) : 0.0f;
  for (int t0 = chunk.begin; t0 < chunk.end; t0 += tile) {
    float x[tile], dt[tile], z[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      const int t = min(t0 + i, chunk.end - 1);
      x[i] = load<T>(p.x, chunk.batch, t, at.c), dt[i] = load<T>(p.dt, chunk.batch, t, at.c);
      z[i] = p.z.data != nullptr ? load<T>(p.z, chunk.batch, t, at.c) : 0.0f;
    }
    if (p.kept != nullptr && (t0 - chunk.sequence_begin) % p.keep == 0) {
      const std::int64_t row = kept_row(p, chunk, t0);
#pragma unroll
      for (int n = 0; n < lane_states; ++n)
        if (at.has(p, n)) p.kept[by_state(p, at, row, n)] = h[n];
    }
    __syncthreads();
    stage<T, parts>(B, p.B, chunk.batch, t0, chunk.end, p.states);
    stage<T, parts>(C, p.C, chunk.batch, t0, chunk.end, p.states);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      if (t0 + i >= chunk.end) break;
      float b[lane_states], c[lane_states];
      load_states(b, B + (i * parts + at.part) * lane_states);
      load_states(c, C + (i * parts + at.part) * lane_states);
      const float step = step_size<T>(p, dt[i], bias), dtx = step * x[i];
      float y = 0.0f, other = 0.0f;  // two chains of sums
#pragma unroll
      for (int n = 0; n < lane_states; n += 2) {
        h[n] = exp2_approx(step * A[n]) * h[n] + dtx * b[n];
        h[n + 1] = exp2_approx(step * A[n + 1]) * h[n + 1] + dtx * b[n + 1];
        y += h[n] * c[n], other += h[n + 1] * c[n + 1];
      }
      y = at.over_parts(y + other) + D * x[i];
      if (p.z.data != nullptr) y *= z[i] * sigmoid(z[i]);
      if (at.writes()) store<T>(p.out, chunk.batch, t0 + i, at.c, y);
    }
  }
  if (chunk.last()) store_leaving(h, p, at, chunk.sequence);
}

ScanParams forward_params(const Scan& args, const char* function) {
  return params_of(args, channel_blocks(args.x.size[2], args.A.size[1]), resident, function);
}

// One token: lanes along the states, which lie next to each other in memory, so that they are moved in whole lines. Bound:
// bytes, the state read and written.
struct StepParams {
  Rows x, dt, z, B, C, out;  // [B, 1, ...]
  Parameter A, D, bias;
  const float* state;
  float* next;
  int batch, channels, states, lanes;
  bool softplus;
};

template <class T>
__global__ void __launch_bounds__(threads) step_kernel(const __grid_constant__ StepParams p) {
  const std::int64_t i = std::int64_t{blockIdx.x} * threads + threadIdx.x, pair = i / p.lanes;
  const int lane = static_cast<int>(i % p.lanes);
  const bool valid = pair < std::int64_t{p.batch} * p.channels;
  const std::int64_t b = valid ? pair / p.channels : 0, c = valid ? pair % p.channels : 0;
  float dt = load<T>(p.dt, b, 0, c) + (p.bias.data != nullptr ? p.bias.at<T>(c) : 0.0f);
  if (p.softplus) dt = softplus(dt);
  const float x = load<T>(p.x, b, 0, c), dtx = dt * x;
  float y = 0.0f;
  for (int n = lane; n < p.states && valid; n += p.lanes) {
    const float h = exp2_approx(dt * log2_e * p.A.at<T>(c, n)) * p.state[pair * p.states + n] + dtx * load<T>(p.B, b, 0, n);
    p.next[pair * p.states + n] = h;
    y += h * load<T>(p.C, b, 0, n);
  }
  for (int bit = p.lanes / 2; bit > 0; bit /= 2) y += __shfl_xor_sync(~0u, y, bit);
  if (lane != 0 || !valid) return;
  if (p.D.data != nullptr) y += p.D.at<T>(c) * x;
  if (p.z.data != nullptr) {
    const float z = load<T>(p.z, b, 0, c);
    y *= z * sigmoid(z);
  }
  store<T>(p.out, b, 0, c, y);
}

// [B, n] as rows of one token
Rows one_token(const TensorView* t) {
  if (t == nullptr) return {};
  Rows rows{static_cast<char*>(t->data), t->stride[0] * element_bytes(t->dtype), 0, nullptr};
  return rows;
}

}  // namespace

std::size_t workspace_bytes(const Scan& args) {
  return carried_floats(forward_params(args, "selective_scan")) * sizeof(float);
}

void selective_scan(const Scan& args, const Launch& to) {
  const char* f = "selective_scan";
  refuse_float64(args.x.dtype, f);
  if (args.keep % tile != 0) throw std::invalid_argument("effcore.selective_scan: on a GPU keep must be a multiple of 8");
  ScanParams p = forward_params(args, f);
  const auto stream = static_cast<cudaStream_t>(to.stream);
  const std::int64_t pairs = std::int64_t{p.states} * p.channels;
  if (p.channels == 0 || p.chunks.sequences == 0) return;
  if (p.kept != nullptr && args.offsets != nullptr)  // some rows belong to no sequence
    check(
        cudaMemsetAsync(p.kept, 0, effcore::scan::kept_states(args.x, args.offsets, args.keep) * pairs * sizeof(float), stream),
        f);
  p.out = rows_of(args.out);
  p.entering = args.initial_state != nullptr ? static_cast<const float*>(args.initial_state->data) : nullptr;
  p.leaving = static_cast<float*>(args.final_state);
  p.carried = static_cast<float*>(to.workspace), p.step_sum = p.carried + p.chunks.rows * pairs;
  with_type(args.x.dtype, f, [&]<class T>(T) {
    with_parts(p.states, [&]<int parts>(std::integral_constant<int, parts>) {
      const unsigned blocks = grid(p.chunks.rows * ceil_div(p.channels, block_channels<parts>), f);
      if (!p.single) {
        launch(f, local_kernel<T, parts>, blocks, threads, 0, stream, p);
        launch(f, carry_kernel<T, false>, grid(ceil_div(p.chunks.sequences * pairs, threads), f), threads, 0, stream, p);
      }
      launch(f, scan_kernel<T, parts>, blocks, threads, 0, stream, p);
    });
  });
}

std::size_t workspace_bytes(const Step&) {
  return 0;
}

void selective_step(const Step& args, const Launch& to) {
  const char* f = "selective_step";
  refuse_float64(args.x.dtype, f);
  StepParams p{one_token(&args.x), one_token(&args.dt), one_token(args.z),
               one_token(&args.B), one_token(&args.C),  one_token(&args.out)};
  p.A = parameter_of(&args.A), p.D = parameter_of(args.D), p.bias = parameter_of(args.dt_bias);
  p.state = static_cast<const float*>(args.state.data), p.next = static_cast<float*>(args.new_state);
  p.batch = static_cast<int>(args.x.size[0]), p.channels = static_cast<int>(args.x.size[1]);
  p.states = static_cast<int>(args.A.size[1]), p.softplus = args.softplus;
  for (p.lanes = 1; p.lanes < p.states && p.lanes < 32;) p.lanes *= 2;
  with_type(args.x.dtype, f, [&]<class T>(T) {
    launch(f, step_kernel<T>, grid(ceil_div(std::int64_t{p.batch} * p.channels * p.lanes, threads), f), threads, 0,
           static_cast<cudaStream_t>(to.stream), p);
  });
}

}  // namespace effcore::cuda::scan
