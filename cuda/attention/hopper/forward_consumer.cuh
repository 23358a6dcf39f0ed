// The warpgroups of the forward (forward.cuh), 64 queries each.
#pragma once
#include "attention/hopper/forward.cuh"

namespace effcore::cuda::hopper {

template <class T, int D, Forward forward>
struct ForwardConsumer {
  using Tiles = ForwardTiles<D>;
  static constexpr int keys = Tiles::keys;
  static constexpr bool anchored = forward == Forward::anchored || forward == Forward::anchored_kept;
  static constexpr bool keeps = keeps_probs(forward), two_passes = forward == Forward::normalised_kept;
  static constexpr int early = early_blocks<D>(forward), parts = value_parts<D>(forward);
  static constexpr bool known_lse = two_passes || forward == Forward::from_lse;
  // Of the operands in shared memory. H200: at D = 128 the shuffles that say it cost 1 to 3 %, at D = 64 anchored gains 1-2 %.
  static constexpr bool say_uniform =
      parts == 0 && (D != 128 || (forward != Forward::anchored && forward != Forward::from_lse));

  ForwardShared<T, D, forward>& shared;
  const TiledForwardParams& p;
  const int warpgroup, lane = threadIdx.x % 32;
  Order<Tiles::warpgroups, parts == 0> order;
  Turn<Tiles::stages> k_turn, v_turn;
  Turn<1> q_turn;

  __device__ ForwardConsumer(ForwardShared<T, D, forward>& shared_, const TiledForwardParams& p_, int warpgroup_)
      : shared(shared_), p(p_), warpgroup(warpgroup_), order(warpgroup_) {}

  __device__ __forceinline__ void run(const Work& work, int number) {
    const Shape& s = p.args.shape;
    const int batch = work.head / s.heads, head = work.head % s.heads;
    const int block0 = work.block * Tiles::rows, row0 = block0 + 64 * warpgroup, last_row = min(row0 + 64, s.queries) - 1;
    const int row = row0 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // the thread's: row and row + 8
    const Visibility seen(s, batch);
    const TileRange tiles(KeyRange(seen, block0, min(block0 + Tiles::rows, s.queries) - 1), keys);
    int first = tiles.first, end = tiles.first;  // of those, this warpgroup's own
    if (row0 < s.queries) {
      const TileRange own(KeyRange(seen, row0, last_row), keys);
      if (own.first < own.end) first = own.first, end = own.end;
    }
    float* const lse = p.args.lse + static_cast<std::int64_t>(work.head) * s.queries;

    auto softmax = [&] {
      if constexpr (anchored)
        return AnchoredSoftmax(s.scale_log2, row, s.queries);
      else
        return Softmax<known_lse>(s.scale_log2);
    }();
    if constexpr (forward == Forward::from_lse) softmax.start(lse, row, s.queries);

    Barrier::wait(&shared.q_full[warpgroup], q_turn.phase);
    const SharedOperand<false> q(shared_address(shared.q[warpgroup]), 64);
    using Scores = float[keys / 2];
    const auto start_scores = [&](Scores& score) {
      const SharedOperand<false> k(shared_address(shared.k[k_turn.stage]), keys, say_uniform);
      shared.k_ring.wait_full(k_turn);
      order.wait();
      if constexpr (parts == 0) pin(score);
      wgmma_begin();
      multiply<T, keys, D / 16>(score, q, k, false);
      wgmma_commit();
    };
    // Tiles between these two need no mask.
    const int low = seen.begin(last_row), high = seen.end(row0) - keys;
    const auto scores_done = [&](Scores& score, int tile) {
      pin(score);
      release_k();
      if (s.negative) {
#pragma unroll
        for (int i = 0; i < keys / 2; ++i) score[i] = -score[i];
      }
      const int key0 = tile * keys;
      if (key0 > high || key0 < low) mask(score, seen, row, s.queries, key0);
    };

    // The strip's kept tiles begin with row `tiles_before * 64` of all.
    using attention::probs_tile;
    const int strip = row0 / probs_tile;
    const int stored = keeps && row0 < s.queries ? attention::probs_tiles(s, strip) * probs_tile : 0;
    const std::int64_t tiles_before = keeps ? work.head * (attention::probs_elements_of(s) / (probs_tile * probs_tile)) +
                                                  attention::probs_tiles_before(s, strip)
                                            : 0;
    const int warp = threadIdx.x / 32 - 4;
    KeptProbs<T, Tiles::kept_buffers> kept(shared.kept[warp], p.probs,
                                           static_cast<int>(tiles_before) * probs_tile + warp % 4 * 16, stored);
    constexpr std::uint32_t nothing[keys / 16][4] = {};
    if constexpr (two_passes) {
      Softmax<false> statistics(s.scale_log2);
      Scores score;
      skip_k(tiles.end, end);
      for (int tile = end - 1; tile >= first; --tile) {
        start_scores(score);
        order.pass_on();
        wgmma_wait<0>();
        scores_done(score, tile);
        statistics.look_at(score);
        statistics.template probabilities<0, keys / 8>(score);
      }
      skip_k(first, tiles.first);
      float factor[2];
      statistics.finish(factor, lse, seen, row, s.queries);
      softmax = statistics.normalised();
    }
    if constexpr (keeps) {
      for (int tile = 0; tile * keys < stored; ++tile)
        if (tile < first || tile >= end) kept.store(nothing, tile * keys);
    }

    float out[D / 2], kept_sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    std::uint32_t probs[keys / 16][4];
    const auto start_values = [&] {
      shared.v_ring.wait_full(v_turn);
      pin(out);
      wgmma_begin();
      multiply<T, D, keys / 16>(out, probs, SharedOperand<true>(shared_address(shared.v[v_turn.stage]), keys, say_uniform),
                                true);
      wgmma_commit();
    };
    const auto values_done = [&] {
      pin(out);
      release_v();
    };

    skip(tiles.end, end);
    if constexpr (parts > 0) {
      for (int tile = end - 1; tile >= first; --tile) {
        Scores score;  // anew, or ptxas sees accumulators that others write while products are under way, and serialises them
        start_scores(score);
        order.pass_on();
        wgmma_wait<0>();
        pin(out);
        if (tile < end - 1) release_v();
        scores_done(score, tile);
        shared.v_ring.wait_full(v_turn);
        const SharedOperand<true> v(shared_address(shared.v[v_turn.stage]), keys, say_uniform);
        constexpr int blocks = keys / 16 / parts;  // of 16 keys
        const auto exponentiate_and_multiply = [&]<int part>() {
          float x[8 * blocks];
#pragma unroll
          for (int i = 0; i < 8 * blocks; ++i) x[i] = score[part * 8 * blocks + i];
          softmax.template probabilities<0, 2 * blocks>(x);
          auto& rounded = *reinterpret_cast<std::uint32_t (*)[blocks][4]>(probs + part * blocks);
          pack<T>(rounded, x);
          SharedOperand<true> rows = v;
          rows.low = static_cast<std::uint32_t>(v.at(part * blocks));
          if (part == 0) pin(out);
          wgmma_begin();
          multiply<T, D, blocks>(out, rounded, rows, true);
          wgmma_commit();
        };
        [&]<int... part>(std::integer_sequence<int, part...>) {
          (exponentiate_and_multiply.template operator()<part>(), ...);
        }(std::make_integer_sequence<int, parts>{});
      }
      release_q();
      wgmma_wait<0>();
      if (first < end) values_done();
    } else if (first < end) {
      Scores score;
      start_scores(score);
      order.pass_on();
      wgmma_wait<0>();
      scores_done(score, end - 1);
      softmax.look_at(score);
      softmax.template probabilities<0, keys / 8>(score);
      pack<T>(probs, score);
      if constexpr (keeps && anchored) add_up<T>(kept_sum, probs);
      for (int tile = end - 2; tile >= first; --tile) {
        start_scores(score);
        start_values();
        order.pass_on();
        if constexpr (keeps) kept.store(probs, (tile + 1) * keys);
        wgmma_wait<1>();
        scores_done(score, tile);
        softmax.look_at(score);
        softmax.template probabilities<0, early>(score);
        // A branch, or ptxas moves the wait that follows before the exponentials.
        if constexpr (early > 0) {
          pin(score);
          if (tile > first) shared.k_ring.wait_full(k_turn);
        }
        wgmma_wait<0>();
        values_done();
        softmax.rescale(out);
        softmax.template probabilities<early, keys / 8>(score);
        pack<T>(probs, score);
        if constexpr (keeps && anchored) add_up<T>(kept_sum, probs);
      }
      release_q();
      start_values();
      if constexpr (keeps) kept.store(probs, first * keys);
      wgmma_wait<0>();
      values_done();
    } else {
      release_q();
    }
    skip(first, tiles.first);

    float factor[2] = {1.0f, 1.0f};
    if constexpr (!known_lse) {
      [[maybe_unused]] const bool fits = softmax.finish(factor, lse, seen, row, s.queries);
      if constexpr (anchored)
        if (!fits && lane == 0) p.again.take_down(number);
    }
    // What is kept adds up to one as it is rounded: where one key has nearly all of a row, its rounding would be all of the
    // output's error, in every layer, and the backward's delta would add them up.
    if constexpr (keeps && anchored)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float total = row_sum(kept_sum[i]);
        factor[i] = total == 0.0f ? 0.0f : 1.0f / total;
      }
    if constexpr (keeps) {
      float* const factors = p.args.factors + static_cast<std::int64_t>(work.head) * s.queries;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (row + 8 * i < s.queries && lane % 4 == 0) factors[row + 8 * i] = factor[i];
      kept.finish();
    }
    if constexpr (known_lse)
      clear_unseeing(out, seen, row0, last_row, row);
    else  // by the sums, so that what asks for the visibility does not stay in registers
      clear_rows(out, factor[0] == 0.0f, factor[1] == 0.0f);
    store_rows<T, D>(p.args.out, batch, head, row, s.queries, 0, out, factor);
  }

 private:
  __device__ __forceinline__ void release_q() {
    if (lane == 0) Barrier::arrive(&shared.q_empty[warpgroup]);
    q_turn.next();
  }
  __device__ __forceinline__ void release_k() {
    if (lane == 0) shared.k_ring.release(k_turn);
    k_turn.next();
  }
  __device__ __forceinline__ void release_v() {
    if (lane == 0) shared.v_ring.release(v_turn);
    v_turn.next();
  }

  // Tiles from - 1 .. to, which only other warpgroups of the block see.
  __device__ __forceinline__ void skip_k(int from, int to) {
    for (int tile = from; tile > to; --tile) {
      order.wait();
      order.pass_on();
      shared.k_ring.wait_full(k_turn);
      release_k();
    }
  }
  __device__ __forceinline__ void skip(int from, int to) {
    for (int tile = from; tile > to; --tile) {
      skip_k(1, 0);
      shared.v_ring.wait_full(v_turn);
      release_v();
    }
  }
};

template <class T, int D, Forward forward>
__global__ void __launch_bounds__(ForwardTiles<D>::threads, 1) forward_kernel(const __grid_constant__ TiledForwardParams p) {
  using Tiles = ForwardTiles<D>;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<T, D, forward>*>(memory);
  if (threadIdx.x == 0) {
    for (auto& full : shared.q_full) Barrier::init(&full, 1);
    for (auto& empty : shared.q_empty) Barrier::init(&empty, 4);
    shared.k_ring.init(4 * Tiles::warpgroups);
    shared.v_ring.init(4 * Tiles::warpgroups);
    shared.queue.ring.init(4 * Tiles::warpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const auto& schedule = p.args.schedule;
  const bool again = (forward == Forward::online || forward == Forward::normalised_kept) && p.again.memory != nullptr;
  const int all = again ? p.again.count() : schedule.blocks * schedule.heads;
  // With two passes blocks of many and of few keys take turns, or all would multiply at one time and write at another (2-8 %).
  // What is done again has the numbers of the launch that took it down.
  const bool heavy_first = p.args.shape.causal && (forward != Forward::normalised_kept || again);
  const auto work_of = [&](int number) {
    if (again) number = p.again.number(number);
    Work work(schedule, number, heavy_first);
    if (p.args.shape.causal && !heavy_first)
      work.block = work.block % 2 == 0 ? schedule.blocks - 1 - work.block / 2 : work.block / 2;
    return work;
  };
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / 128) - 1;
  if (warpgroup < 0) {
    cutlass::arch::warpgroup_reg_dealloc<Tiles::producer_registers>();
    if (threadIdx.x >= 32) return;
    ForwardProducer<T, D, forward> producer{shared, p};
    WorkSource(shared.queue, p.ticket, all).for_each([&](int number) { producer.run(work_of(number)); });
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::consumer_registers>();
    ForwardConsumer<T, D, forward> consumer(shared, p, warpgroup);
    WorkSink(shared.queue, all).for_each([&](int number) { consumer.run(work_of(number), number); });
  }
}

}  // namespace effcore::cuda::hopper
