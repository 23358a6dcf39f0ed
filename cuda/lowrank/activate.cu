// An activation and its gradient on [rows, columns], element by element. Bound: memory.
#include <type_traits>

#include "common/element.cuh"
#include "common/error.h"
#include "effcore/cuda/lowrank.h"
#include "lowrank/activation.cuh"

namespace effcore::cuda::lowrank {
namespace {

constexpr int threads = 256;

struct Elements {
  const void *in, *dout;  // dout: of the gradient, or null
  void* out;
  std::int64_t in_stride, dout_stride, out_stride;
  std::int64_t rows, columns;
  Activation activation;
};

// Rows that follow each other in memory are one long row (the launch sees to it); 16 bytes a load where all are aligned.
template <class T, bool vectors>
__global__ void __launch_bounds__(threads) elements_kernel(const Elements p) {
  constexpr int n = vectors ? 16 / sizeof(T) : 1;
  struct alignas(n * sizeof(T)) Pack {
    T x[n];
  };
  const std::int64_t packs = p.columns / n, total = p.rows * packs, stride = static_cast<std::int64_t>(gridDim.x) * threads;
  dispatch(p.activation, [&](auto f) {
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += stride) {
      const std::int64_t row = i / packs, column = i % packs * n;
      Pack x = *reinterpret_cast<const Pack*>(static_cast<const T*>(p.in) + row * p.in_stride + column);
      if (p.dout != nullptr) {
        const Pack g = *reinterpret_cast<const Pack*>(static_cast<const T*>(p.dout) + row * p.dout_stride + column);
#pragma unroll
        for (int k = 0; k < n; ++k) x.x[k] = from_float<T>(to_float(g.x[k]) * derivative<decltype(f)::value>(to_float(x.x[k])));
      } else {
#pragma unroll
        for (int k = 0; k < n; ++k) x.x[k] = from_float<T>(value<decltype(f)::value>(to_float(x.x[k])));
      }
      *reinterpret_cast<Pack*>(static_cast<T*>(p.out) + row * p.out_stride + column) = x;
    }
  });
}

template <class T>
void run(Elements p, const Launch& launch) {
  if (p.rows * p.columns == 0) return;
  if ((p.in_stride == p.columns && p.out_stride == p.columns && (p.dout == nullptr || p.dout_stride == p.columns)) ||
      p.rows == 1)
    p.columns *= p.rows, p.rows = 1;
  const auto multiple = [](const void* data, std::int64_t elements) {
    return (reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(elements * sizeof(T))) % 16 == 0;
  };
  const bool strides = p.rows == 1 || (multiple(p.in, p.in_stride) && multiple(p.out, p.out_stride) &&
                                       (p.dout == nullptr || multiple(p.dout, p.dout_stride)));
  const bool vectors = strides && multiple(p.in, p.columns) && multiple(p.out, 0) && multiple(p.dout, 0);
  const std::int64_t items = p.rows * p.columns / (vectors ? 16 / sizeof(T) : 1);
  const std::int64_t wanted = (items + threads - 1) / threads;
  const unsigned blocks = static_cast<unsigned>(wanted < 132 * 32 ? wanted : 132 * 32);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (vectors)
    elements_kernel<T, true><<<blocks, threads, 0, stream>>>(p);
  else
    elements_kernel<T, false><<<blocks, threads, 0, stream>>>(p);
  check_launch("lowrank_linear");
}

void run_dtype(DType dtype, const Elements& p, const Launch& launch) {
  switch (dtype) {
    case DType::bfloat16: return run<bf16>(p, launch);
    case DType::float16: return run<fp16>(p, launch);
    default: return run<float>(p, launch);
  }
}

}  // namespace

void activate(const Activate& args, const Launch& launch) {
  run_dtype(args.in.dtype,
            {args.in.data, nullptr, args.out.data, args.in.stride[0], 0, args.out.stride[0], args.in.size[0], args.in.size[1],
             args.activation},
            launch);
}

void activate_backward(const ActivateBackward& args, const Launch& launch) {
  run_dtype(args.dout.dtype,
            {args.before.data, args.dout.data, args.dz.data, args.before.stride[0], args.dout.stride[0], args.dz.stride[0],
             args.dout.size[0], args.dout.size[1], args.activation},
            launch);
}

}  // namespace effcore::cuda::lowrank
