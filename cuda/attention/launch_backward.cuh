// Launchers of the backward kernels.
#pragma once
#include <algorithm>

#include "attention/backward.cuh"
#include "attention/delta.cuh"
#include "attention/launch_forward.cuh"

namespace effcore::cuda::attention {

template <class T, int D, Gradients gradients, bool from_probs, bool compact>
void launch_backward(const BackwardParams& p, const char* function, cudaStream_t stream) {
  using Tiles = BackwardTiles<T, D, gradients, from_probs, compact>;
  const Shape& s = p.shape;
  BackwardParams params = p;
  // What a block of keys streams past is q and dout of the group's heads.
  const double bytes = static_cast<double>(s.queries) * s.group * (s.head_dim + p.layers * s.value_dim) * sizeof(T);
  params.schedule = schedule_of(s.batch * s.kv_heads, ceil_div(s.keys, Tiles::keys), bytes, 1);
  // Blocks of keys of one head wait for each other's dq: as few of them at a time as there are multiprocessors to fill.
  if (Tiles::wants_dq)
    params.schedule.section = std::min(
        params.schedule.heads, std::max(params.schedule.section, device_attribute(cudaDevAttrMultiProcessorCount, function)));
  launch(function, backward_kernel<T, D, gradients, from_probs, compact>, blocks_of(params.schedule), Tiles::threads,
         Tiles::shared_bytes(p.layers), stream, params);
}

// At D = 256 dk and dv do not fit the registers together: two launches.
template <int D>
constexpr Gradients owner_gradients = D == 256 ? Gradients::dq_dk : Gradients::all;

template <class T, int D>
BackwardPlan Kernels<T, D>::backward_plan(bool from_probs, int layers, const char* function) {
  const auto plan = [&]<bool probs, bool compact>() -> BackwardPlan {
    using Tiles = BackwardTiles<T, D, owner_gradients<D>, probs, compact>;
    return {compact, Tiles::queries, Tiles::keys, Tiles::dq_elements, 0};
  };
  const auto bytes = [&]<bool probs, bool compact>() {
    return BackwardTiles<T, D, owner_gradients<D>, probs, compact>::shared_bytes(layers);
  };
  const int available = shared_memory_limit(function);
  if (from_probs ? bytes.template operator()<true, false>() <= available
                 : bytes.template operator()<false, false>() <= available)
    return from_probs ? plan.template operator()<true, false>() : plan.template operator()<false, false>();
  if (from_probs ? bytes.template operator()<true, true>() > available : bytes.template operator()<false, true>() > available)
    throw std::runtime_error(std::string("effcore.") + function + ": this GPU has too little shared memory a block (" +
                             std::to_string(available) + " bytes) for the backward at this head dimension and dtype");
  return from_probs ? plan.template operator()<true, true>() : plan.template operator()<false, true>();
}

template <class T, int D>
void Kernels<T, D>::shared_backward(const BackwardParams& p, const char* function, cudaStream_t stream) {
  if (p.probs != nullptr)
    launch_backward<T, D, Gradients::dv, true, false>(p, function, stream);
  else
    launch_backward<T, D, Gradients::dv, false, false>(p, function, stream);
}

template <class T, int D>
void Kernels<T, D>::backward(const BackwardParams& p, bool compact, const char* function, cudaStream_t stream) {
  if (owner_gradients<D> == Gradients::dq_dk) {
    BackwardParams own = p;
    own.layers = 1;
    shared_backward(own, function, stream);
  }
  constexpr Gradients gradients = owner_gradients<D>;
  if (p.probs != nullptr)
    compact ? launch_backward<T, D, gradients, true, true>(p, function, stream)
            : launch_backward<T, D, gradients, true, false>(p, function, stream);
  else
    compact ? launch_backward<T, D, gradients, false, true>(p, function, stream)
            : launch_backward<T, D, gradients, false, false>(p, function, stream);
}

template <class T, int D>
void Kernels<T, D>::delta(const DeltaParams& p, const char* function, cudaStream_t stream) {
  const unsigned blocks = delta_blocks_a_head<T, D>(p.shape) * static_cast<unsigned>(p.shape.batch * p.shape.heads);
  // Without a row there are still turns to be zeroed.
  launch(function, delta_kernel<T, D>, p.turns != nullptr && blocks == 0 ? 1u : blocks, delta_threads, 0, stream, p);
}

}  // namespace effcore::cuda::attention
