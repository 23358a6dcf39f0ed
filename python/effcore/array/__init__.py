"""effcore's attention, token movement and scans on NumPy arrays (CPU) and CuPy arrays (GPU), without torch.

The same kernels as ``effcore.ops.attention``, ``effcore.ops.routing`` and ``effcore.ops.scan``, reached through DLPack:
nothing is copied, and importing this module imports neither torch nor CuPy. There is no autograd here: the backward functions
are called by name.

All arrays of one call share a dtype of float32, float16, bfloat16 (``ml_dtypes.bfloat16``), or float64 (NumPy alone), and a
device. Any strides with a contiguous last dimension; read-only arrays are welcome. Results are fresh arrays of the same kind.

Attention: ``q`` [B, Hq, Sq, D], ``k`` [B, Hkv, Sk, D], ``v`` [B, Hkv, Sk, Dv]; Hq is a multiple of Hkv and query head h reads
kv head h // (Hq // Hkv). out, dq, dk and dv are in the memory order (head- or token-major) of q, q, k and v. Visibility is the
same everywhere: query i of row b sees the keys j with ``first_key[b, i] <= j < lengths[b]``, and with ``causal`` also
``j <= i + lengths[b] - Sq`` (aligned to the end). ``lengths`` is int32 [B] (default Sk); ``first_key`` is int32 [B] or [B, Sq],
non-decreasing along Sq. A query that sees no key gives zeros.

Token movement: ``x`` [B, N, C]; a list of tokens is int32 [B, K]; a partition is two lists, both ascending, that name each
token of a row once. Values of indices are checked on the CPU; on the GPU a bad index reads and writes no memory of others, but
its rows are undefined.

Convolution and scan: ``x`` [B, L, E]; sums, states and gradients of parameters are float32 (float64 for float64 inputs), and
parameters may be. With ``offsets`` int32 [S + 1] the batch has one row of S sequences that know nothing of each other.

On the GPU the kernels run on CuPy's current stream, their scratch memory comes from CuPy's allocator, and nothing
synchronises. On the CPU they run on :func:`set_num_threads` threads and release the GIL.

A bad argument is a ``ValueError`` or ``TypeError`` that names the argument, what was expected and what came.
"""

from __future__ import annotations

from effcore.array._attention import (
    AttentionScores,
    DecodeProbs,
    attention,
    attention_backward,
    attention_from_scores,
    attention_from_scores_backward,
    attention_with_scores,
    decode_attention,
    decode_from_probs,
)
from effcore.array._native import build_info, get_num_threads, set_num_threads
from effcore.array._routing import (
    GatheredNorm,
    class_scores,
    gather_layer_norm,
    gather_norm_backward,
    gather_rms_norm,
    gather_tokens,
    gather_tokens_backward,
    merge_tokens,
    partition_tokens,
    score_partition,
    separate_tokens,
)
from effcore.array._scan import (
    ConvolutionGradients,
    ScanGradients,
    ScanStates,
    causal_conv1d,
    causal_conv1d_backward,
    selective_scan,
    selective_scan_backward,
    selective_scan_with_states,
    selective_step,
)

__all__ = [
    "AttentionScores",
    "ConvolutionGradients",
    "DecodeProbs",
    "GatheredNorm",
    "ScanGradients",
    "ScanStates",
    "attention",
    "attention_backward",
    "attention_from_scores",
    "attention_from_scores_backward",
    "attention_with_scores",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_backward",
    "class_scores",
    "decode_attention",
    "decode_from_probs",
    "gather_layer_norm",
    "gather_norm_backward",
    "gather_rms_norm",
    "gather_tokens",
    "gather_tokens_backward",
    "get_num_threads",
    "merge_tokens",
    "partition_tokens",
    "score_partition",
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_with_states",
    "selective_step",
    "separate_tokens",
    "set_num_threads",
]
