// Launchers of the backward kernels.
#pragma once
#include <algorithm>

#include "attention/backward.cuh"
#include "attention/delta.cuh"
#include "attention/launch_forward.cuh"

namespace effcore::cuda::attention {

template <class T, int D, Gradients gradients, bool from_probs>
void launch_backward(const BackwardParams& p, const char* function, cudaStream_t stream) {
  using Tiles = BackwardTiles<T, D, gradients, from_probs>;
  const Shape& s = p.shape;
  BackwardParams params = p;
  // What a block of keys streams past is q and dout of the group's heads.
  const double bytes = static_cast<double>(s.queries) * s.group * (s.head_dim + p.layers * s.value_dim) * sizeof(T);
  params.schedule = schedule_of(s.batch * s.kv_heads, ceil_div(s.keys, Tiles::keys), bytes, 1);
  // Blocks of keys of one head wait for each other's dq: as few of them at a time as there are multiprocessors to fill.
  if (Tiles::wants_dq) params.schedule.section = std::min(params.schedule.heads, std::max(params.schedule.section, device_attribute(cudaDevAttrMultiProcessorCount, function)));
  const int shared_bytes = Tiles::shared_bytes(p.layers);
  if (shared_bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function))
    throw std::runtime_error(std::string("effcore.") + function + ": this GPU has too little shared memory for this head dimension and " +
                             std::to_string(p.layers) + " layers (" + std::to_string(shared_bytes) + " bytes a block are needed)");
  launch(function, backward_kernel<T, D, gradients, from_probs>, blocks_of(params.schedule), Tiles::threads, shared_bytes, stream, params);
}

template <class T, int D>
BackwardPlan Kernels<T, D>::backward_plan(bool from_probs) {
  using Computed = BackwardTiles<T, D, Gradients::all, false>;
  using Kept = BackwardTiles<T, D, Gradients::all, true>;
  if (from_probs) return {Kept::queries, Kept::keys, Kept::dq_elements};
  return {Computed::queries, Computed::keys, Computed::dq_elements};
}

template <class T, int D>
void Kernels<T, D>::shared_backward(const BackwardParams& p, const char* function, cudaStream_t stream) {
  if (p.probs != nullptr) launch_backward<T, D, Gradients::dv, true>(p, function, stream);
  else launch_backward<T, D, Gradients::dv, false>(p, function, stream);
}

template <class T, int D>
void Kernels<T, D>::backward(const BackwardParams& p, const char* function, cudaStream_t stream) {
  if constexpr (D == 256) {  // dk and dv do not fit the registers together
    BackwardParams own = p;
    own.layers = 1;
    shared_backward(own, function, stream);
    if (p.probs != nullptr) launch_backward<T, D, Gradients::dq_dk, true>(p, function, stream);
    else launch_backward<T, D, Gradients::dq_dk, false>(p, function, stream);
  } else {
    if (p.probs != nullptr) launch_backward<T, D, Gradients::all, true>(p, function, stream);
    else launch_backward<T, D, Gradients::all, false>(p, function, stream);
  }
}

template <class T, int D>
void Kernels<T, D>::delta(const DeltaParams& p, const char* function, cudaStream_t stream) {
  const std::int64_t rows = static_cast<std::int64_t>(p.shape.batch) * p.shape.heads * p.shape.queries;
  const unsigned blocks = static_cast<unsigned>((rows + delta_rows<T, D> - 1) / delta_rows<T, D>);
  // Without a row there are still turns to be zeroed.
  launch(function, delta_kernel<T, D>, p.turns != nullptr && blocks == 0 ? 1u : blocks, delta_threads, 0, stream, p);
}

}  // namespace effcore::cuda::attention
