// How the owner's gradients (backward.cuh) leave the accumulators: parts of dq to their sums, in turns, and dk and dv at a
// block's end.
#pragma once
#include "attention/hopper/backward_helpers.cuh"

namespace effcore::cuda::hopper {

// The warpgroup's half of a block's dq [queries x D], 64 rows or 64 columns of it, to the sums.
template <class T, int D, int queries>
__device__ __forceinline__ void add_dq(const OwnerParams& p, const StepInfo& info, float (&dq)[32], int warpgroup) {
  float4* const sums = sums_of<queries * D>(p.dq_sums, info.slot, warpgroup);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float part[4] = {dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]};
    if (info.flags & step_first)
      __stcg(sums + n * 128, make_float4(part[0], part[1], part[2], part[3]));
    else
      attention::add_in_turn(sums + n * 128, part);
  }
}

// The last part, and with it all of dq, scaled and rounded.
template <class T, int D, int queries>
__device__ __forceinline__ void store_dq(const OwnerParams& p, const StepInfo& info, float (&dq)[32], int warpgroup) {
  const Shape& s = p.shape;
  if (!(info.flags & step_first)) {
    const float4* const sums = sums_of<queries * D>(p.dq_sums, info.slot, warpgroup);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 before = __ldcg(sums + n * 128);
      dq[4 * n] += before.x, dq[4 * n + 1] += before.y, dq[4 * n + 2] += before.z, dq[4 * n + 3] += before.w;
    }
  }
  const float scale = s.negative ? -s.scale : s.scale, factor[2] = {scale, scale};
  const int row = info.slot / ((s.queries + queries - 1) / queries), lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int query = info.query0 + (queries == 128 ? 64 * warpgroup : 0) + 16 * warp + lane / 4;
  if (info.flags & step_masked)
    clear_unseeing(dq, Visibility(s, row / s.heads), info.query0, min(info.query0 + queries, s.queries) - 1, query);
  store_rows<T, 64>(p.dq, row / s.heads, row % s.heads, query, s.queries, D == 128 ? 64 * warpgroup : 0, dq, factor);
}

// A group's warpgroup's end of dq's turns (owner_take_turns has the other), a part a step.
template <class T, int D, Values values>
class DqParts {
 public:
  using Tiles = OwnerTiles<D, values>;
  __device__ DqParts(const OwnerParams& p, OwnerControl<Tiles>& control, std::uint32_t base, int warpgroup)
      : p_(p),
        control_(control),
        part_at_(base + p.dq_at + (warpgroup * (Tiles::dq_elements / 8) + threadIdx.x % 128) * 16),
        warpgroup_(warpgroup) {}

  // Leaves the part in shared memory, from where a helper adds it, or, where there is no room, adds it here when its turn has
  // come. With the last part, dq.
  __device__ __forceinline__ void add(const StepInfo& step, float (&dq)[32]) {
    const bool last = step.flags & step_last, staged = p_.dq_at > 0;
    const std::uint32_t parity = steps_++ % 2;
    if (!last && staged) {
      Barrier::wait(&control_.dq_free[0], parts_++ % 2 ^ 1);
#pragma unroll
      for (int n = 0; n < 8; ++n)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(part_at_ + n * 128 * 16), "f"(dq[4 * n]),
                     "f"(dq[4 * n + 1]), "f"(dq[4 * n + 2]), "f"(dq[4 * n + 3])
                     : "memory");
    } else {
      Barrier::wait(&control_.turn[parity], turns_ >> parity & 1);
      turns_ ^= 1u << parity;
      if (last)
        store_dq<T, D, Tiles::queries>(p_, step, dq, warpgroup_);
      else
        add_dq<T, D, Tiles::queries>(p_, step, dq, warpgroup_);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) Barrier::arrive(&control_.added[parity]);
  }

 private:
  const OwnerParams& p_;
  OwnerControl<Tiles>& control_;
  const std::uint32_t part_at_;
  const int warpgroup_;
  std::uint32_t steps_ = 0, parts_ = 0, turns_ = 0;  // parts in shared memory; bits: phases of control.turn
};

// One layer's dk and dv where other layers share its keys and values: in float32, plus what these have left there, or, with the
// first layer, the sum of all, which store_block rounds.
template <int D>
__device__ __forceinline__ void sum_block(const OwnerParams& p, char* shared, OwnerControl<OwnerTiles<D, Values::one>>& control,
                                          int batch, int kv_head, int key, int row, float (&dk)[D / 2], float (&dv)[D / 2],
                                          float& scale) {
  using Tiles = OwnerTiles<D, Values::one>;
  const bool adds_dk = p.dk_sum.data != nullptr, adds_dv = p.dv_sum.data != nullptr;
  if (adds_dk || adds_dv) wait_for(&control.sums, 0);
  if (p.float_dk || p.float_dv) wait_for(&control.ended, 0);
  char* const rows = shared + row * panel_row_bytes;
  if (adds_dv || p.float_dv) pass_sums<D>(rows + Tiles::dv_at, Tiles::sum_panel_bytes, dv, 1.0f, adds_dv, p.float_dv);
  if (p.float_dv) send_panels<D, 32>(p.dv_map, rows + Tiles::dv_at, Tiles::sum_panel_bytes, key, kv_head, batch);
  if (adds_dk || p.float_dk) {
    pass_sums<D>(rows + Tiles::dk_at, Tiles::sum_panel_bytes, dk, scale, adds_dk, p.float_dk);
    scale = 1.0f;
  }
  if (p.float_dk) send_panels<D, 32>(p.dk_map, rows + Tiles::dk_at, Tiles::sum_panel_bytes, key, kv_head, batch);
}

// dk and dv of a warpgroup's 64 keys from key0 on. (One layer's in float32 leave by sum_block.)
template <class T, int D, Values values>
__device__ __forceinline__ void store_block(const OwnerParams& p, char* shared, OwnerControl<OwnerTiles<D, values>>& control,
                                            int batch, int kv_head, int key0, int warpgroup, float (&dk)[D / 2],
                                            float (&dv)[D / 2]) {
  using Tiles = OwnerTiles<D, values>;
  const Shape& s = p.shape;
  const int thread = threadIdx.x - helper_threads, warp = thread / 32 % 4;
  const int row = 64 * warpgroup + 16 * warp, key = key0 + 16 * warp;
  float scale = s.negative ? -s.scale : s.scale;
  if constexpr (values == Values::one) sum_block<D>(p, shared, control, batch, kv_head, key, row, dk, dv, scale);
  constexpr bool one = values == Values::one;
  if (!Tiles::hastens_end || (!one && (p.float_dk || p.float_dv))) {
    if (!one || !p.float_dv) store_keys<T, D>(p.dv, !one && p.float_dv, batch, kv_head, key, s.keys, dv, 1.0f);
    if (!one || !p.float_dk) store_keys<T, D>(p.dk, !one && p.float_dk, batch, kv_head, key, s.keys, dk, scale);
  } else {
    constexpr int panel_bytes = Tiles::keys * panel_row_bytes;
    char* const rows = shared + row * panel_row_bytes;
    if (!p.float_dv)  // over values, of which each warpgroup reads its own rows
      send_keys<T, D>(p.dv_map, rows + Tiles::dout_at + p.dout_stages * Tiles::queries_bytes, panel_bytes, dv, 1.0f, key,
                      kv_head, batch);
    if (!p.float_dk) {
      cutlass::arch::NamedBarrier::sync(32 * consumer_warps, 1);  // both have read all keys
      send_keys<T, D>(p.dk_map, rows + Tiles::k_at, panel_bytes, dk, scale, key, kv_head, batch);
    }
  }
  if constexpr (Tiles::hastens_end || one) cute::tma_store_wait<0>();
}

}  // namespace effcore::cuda::hopper
