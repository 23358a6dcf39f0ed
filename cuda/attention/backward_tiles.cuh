// How backward.cuh cuts its work, and the walk over the blocks of queries that meet one block of keys.
#pragma once
#include "attention/visibility.cuh"

namespace effcore::cuda::attention {

// Which gradients a kernel computes: those of a consumer (dv), of an owner, or of an owner whose dv another launch computes.
enum class Gradients { dv, all, dq_dk };

template <class T, int D, Gradients gradients, bool from_probs, bool compact>
struct BackwardTiles {
  static constexpr bool wants_dv = gradients != Gradients::dq_dk, wants_dq = gradients != Gradients::dv;
  static constexpr int size = static_cast<int>(sizeof(T));
  // A warp owns 16 keys and all D columns of their dk and dv: 2 * D / 2 registers, so at D = 256 the two are separate launches.
  // 128 keys halve the traffic of Q, dO and dq against 64; where K and V would not fit beside the ring, fewer. `compact` is for
  // GPUs with 99 KiB of shared memory a block (sm_86, sm_89, sm_120), and for several layers at D = 128 on an A100.
  // Where kept P takes shared memory anyway, two small blocks an SM do better than a large one: 296 against 273 TFLOP/s for a
  // group of four layers (H100, D = 64, length 8192).
  static constexpr bool narrow = compact || (D == 64 && from_probs && wants_dq);
  static constexpr int keys = is_16bit<T> ? (D <= 128 ? 128 : 64) / (narrow ? 2 : 1) : (D == 64 ? 64 : 32);
  // 128 queries have half the barriers and turns of 64: 213 against 180 TFLOP/s on an H100 (D = 64, length 8192); kept P
  // [queries x keys] would then fill shared memory, and gains nothing.
  static constexpr bool wide = D == 64 && wants_dq && !from_probs && !compact;
  static constexpr int queries =
      is_16bit<T> ? (wide ? 128 : (D <= 128 ? 64 : 32) / (compact && D > 64 ? 2 : 1)) : (D <= 128 && !compact ? 32 : 16);
  static constexpr int warps = keys / 16, threads = 32 * warps;

  static constexpr bool reads_q = wants_dq || !from_probs, reads_k = reads_q;
  static constexpr int ds_columns = queries * size < 128 ? 128 / size : queries;  // the swizzle wants 128 bytes a row
  static constexpr int probs_columns = keys * size < 128 ? 128 / size : keys;
  static constexpr int keys_bytes = keys * D * size, queries_bytes = queries * D * size;
  // Offsets in shared memory. What rotates has two stages; V has two only where there are several layers, so it stands last.
  static constexpr int k_at = 0;
  static constexpr int dout_at = k_at + (reads_k ? keys_bytes : 0);
  static constexpr int q_at = dout_at + 2 * queries_bytes;
  static constexpr int probs_at = q_at + (reads_q ? 2 * queries_bytes : 0);
  static constexpr int ds_at = probs_at + (from_probs ? 2 * queries * probs_columns * size : 0);
  static constexpr int statistics_at = ds_at + (wants_dq ? keys * ds_columns * size : 0);
  static constexpr int v_at = (statistics_at + 4 * queries * 4 + 1023) / 1024 * 1024;
  static constexpr int shared_bytes(int layers) { return v_at + (wants_dq ? (layers > 1 ? 2 : 1) * keys_bytes : 0); }

  // dq [queries x D] of a step: warps stand in a grid of dq_down x (warps / dq_down), each with dq_rows x dq_columns blocks of
  // 16 x 16.
  static constexpr int dq_down = queries >= 128 ? 4 : queries >= 32 ? 2 : 1;
  static constexpr int dq_rows = queries / 16 / dq_down, dq_columns = D / 16 / (warps / dq_down);
  static constexpr int dq_elements = queries * D;
};

// One step of a block of keys: a block of queries of one of the group's heads.
struct Step {
  int head, block;
  __device__ bool exists() const { return block >= 0; }
};

// The blocks of keys that a block of queries meets.
struct KeyBlocks {
  int first, last;  // last < first: none
  __device__ KeyBlocks(const Visibility& seen, int queries, int block, int block_q, int block_k) {
    const int row0 = block * block_q;
    const KeyRange range(seen, row0, min(row0 + block_q, queries) - 1);
    first = range.begin / block_k, last = range.empty() ? first - 1 : (range.end - 1) / block_k;
  }
};

// Enumerates, for one block of keys, head by head, the blocks of queries that meet it, the last first; a warp looks at 32 of
// them at a time. All threads of a block enumerate the same steps.
//
// Last first because of the turns (turns.cuh): blocks of keys that start together all begin at the same queries and follow each
// other one step apart. First first, causal blocks of keys would begin at their diagonals, and each would wait for its
// predecessor to come there.
template <int block_q, int block_k>
class Steps {
 public:
  __device__ Steps(const Visibility& seen, int queries, int heads, int key_block)
      : seen_(seen), queries_(queries), heads_(heads), key_block_(key_block), last_((queries + block_q - 1) / block_q - 1) {
    // Causal: the first query whose end lies behind the block's first key.
    first_ = seen.causal ? max(key_block * block_k - seen.offset, 0) / block_q : 0;
    base_ = last_ + 32;
  }

  __device__ Step next() {
    while (mask_ == 0) {
      base_ -= 32;
      if (base_ < first_) {
        base_ = last_;
        if (++head_ >= heads_ || last_ < first_) return {0, -1};
      }
      const int block = base_ - static_cast<int>(threadIdx.x % 32);
      bool meets = false;
      if (block >= first_) {
        const KeyBlocks keys(seen_, queries_, block, block_q, block_k);
        meets = keys.first <= key_block_ && key_block_ <= keys.last;
      }
      mask_ = __ballot_sync(~0u, meets);
    }
    const int bit = __ffs(mask_) - 1;
    mask_ &= mask_ - 1;
    return {head_, base_ - bit};
  }

 private:
  const Visibility& seen_;
  int queries_, heads_, key_block_, first_, last_, base_, head_ = 0;
  unsigned mask_ = 0;
};

}  // namespace effcore::cuda::attention
