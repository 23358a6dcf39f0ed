"""Kernels of the GPU on CuPy arrays: the functions of effcore._core, installed where CUDA is."""

from typing import Any

from effcore._core import attention as attention
from effcore._core import attention_backward as attention_backward
from effcore._core import attention_from_scores as attention_from_scores
from effcore._core import attention_from_scores_backward as attention_from_scores_backward
from effcore._core import decode_attention as decode_attention
from effcore._core import decode_from_probs as decode_from_probs

def build_info() -> dict[str, Any]: ...
def path(family: str, dtype: str) -> str: ...
