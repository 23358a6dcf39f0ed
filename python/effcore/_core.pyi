"""Kernels of the CPU on NumPy arrays; the public functions are in effcore.array.

``empty`` is numpy.empty and ``stream`` 0 (effcore._cuda, of the same functions: cupy.empty and a CUDA stream, where 1 is the
default stream).
"""

from collections.abc import Callable, Sequence
from typing import Any

def build_info() -> dict[str, Any]: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def attention(
    empty: Callable[..., Any],
    stream: int,
    q: Any,
    k: Any,
    v: Any,
    lengths: Any | None,
    first_key: Any | None,
    causal: bool,
    scale: float | None,
    keep_probs: bool,
    /,
) -> tuple[Any, Any, Any | None]: ...
def attention_from_scores(
    empty: Callable[..., Any],
    stream: int,
    q: Any,
    k: Any,
    v: Any,
    lse: Any,
    probs: Any | None,
    lengths: Any | None,
    first_key: Any | None,
    causal: bool,
    scale: float | None,
    /,
) -> Any: ...
def attention_from_scores_backward(
    empty: Callable[..., Any],
    stream: int,
    dout: Any,
    out: Any,
    q: Any,
    k: Any,
    v: Any,
    lse: Any,
    probs: Any | None,
    lengths: Any | None,
    first_key: Any | None,
    causal: bool,
    scale: float | None,
    /,
) -> tuple[Any, Any]: ...
def attention_backward(
    empty: Callable[..., Any],
    stream: int,
    douts: Sequence[Any],
    values: Sequence[Any],
    out: Any,
    q: Any,
    k: Any,
    lse: Any,
    probs: Any | None,
    delta: Any | None,
    lengths: Any | None,
    first_key: Any | None,
    causal: bool,
    scale: float | None,
    float32_kv: bool,
    /,
) -> tuple[Any, Any, Any]: ...
def decode_attention(
    empty: Callable[..., Any],
    stream: int,
    q: Any,
    k: Any,
    v: Any,
    lengths: Any,
    first_key: Any | None,
    scale: float | None,
    return_probs: bool,
    /,
) -> tuple[Any, Any | None, Any | None]: ...
def decode_from_probs(
    empty: Callable[..., Any],
    stream: int,
    weights: Any,
    scales: Any,
    v: Any,
    lengths: Any,
    first_key: Any | None,
    /,
) -> Any: ...
