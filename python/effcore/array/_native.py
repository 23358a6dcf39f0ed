"""Where an array function runs: the native function for NumPy's arrays or CuPy's, threads, what was built."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy

from effcore import _core

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; CuPy is not a dependency


def set_num_threads(count: int) -> None:
    """Threads of the CPU functions, the calling one included.

    At first ``OMP_NUM_THREADS``, or else as many as the processors that this process may use. The results do not depend on
    it. Calls that overlap in time do not share the threads: the first has them, the others run on their caller's.
    """
    _core.set_num_threads(count)


def get_num_threads() -> int:
    """What :func:`set_num_threads` set."""
    return _core.num_threads()


def build_info() -> dict[str, Any]:
    """Version, compiler, instruction set in use, threads, dtypes, and whether the CUDA kernels are installed (``cuda``: the
    GPU architectures that they were compiled for, or None)."""
    info = _core.build_info()
    try:
        from effcore import _cuda
    except ImportError:
        return {**info, "cuda": None}
    return {**info, "cuda": _cuda.build_info()}


def call(function: str, leader: Array, *arguments: Any, argument: str = "q") -> Any:
    """Runs a native function where ``leader`` lives; ``argument`` is its name in messages."""
    if isinstance(leader, numpy.ndarray):
        return getattr(_core, function)(numpy.empty, 0, *arguments)
    cupy = sys.modules.get("cupy")  # whoever holds a CuPy array has imported it
    if cupy is not None and isinstance(leader, cupy.ndarray):
        native = _cuda_function(function)
        with leader.device:  # allocations and the current stream are a matter of the current device
            stream = cupy.cuda.get_current_stream().ptr
            return native(cupy.empty, stream or 1, *arguments)  # 1 is how DLPack writes the default stream
    kind = f"{type(leader).__module__}.{type(leader).__qualname__}".removeprefix("builtins.")
    hint = "; torch tensors go to effcore.ops" if kind.startswith("torch.") else ""
    raise TypeError(f"effcore.array.{function}: {argument} must be a NumPy or CuPy array, got {kind}{hint}")


def _cuda_function(function: str) -> Callable[..., Any]:
    try:
        from effcore import _cuda
    except ImportError as error:
        raise RuntimeError(
            f"effcore.array.{function}: the arrays are on a GPU, but effcore was installed without its CUDA kernels ({error}); "
            "install it where nvcc and a CUDA torch are found, or with EFFCORE_CUDA=ON"
        ) from error
    return getattr(_cuda, function)
