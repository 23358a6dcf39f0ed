"""Finds and loads the native libraries."""

from __future__ import annotations

from pathlib import Path


def library(stem: str) -> Path | None:
    """The shared library ``lib<stem>.so`` of a wheel or of an editable install (whose package has several roots)."""
    import effcore

    for root in map(Path, effcore.__path__):
        path = root / "lib" / f"lib{stem}.so"
        if path.is_file():
            return path
    return None


def load_torch_ops() -> None:
    """Registers ``torch.ops.effcore``: the CPU kernels, and the CUDA kernels where torch has CUDA."""
    import torch

    cpu = library("effcore_torch")
    if cpu is None:
        raise ImportError(
            "effcore's native library is missing: install the package (pip install --no-build-isolation .) "
            "instead of importing it from its source folder"
        )
    torch.ops.load_library(cpu)
    cuda = library("effcore_torch_cuda")
    if cuda is not None and torch.version.cuda is not None:
        torch.ops.load_library(cuda)
