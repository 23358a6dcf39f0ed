"""A corpus and a recipe so small that a run takes a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

TINY = [
    "model.layers=4",
    "hidden_size=32",
    "heads=2",
    "kv_heads=1",
    "mlp_size=48",
    "data.length=32",
    "validation_windows=4",
    "validation_fraction=0.2",
    "steps=12",
    "batch_size=2",
    "log_every=1",
    "validate_every=4",
    "checkpoint_every=4",
    "epas.switch_every=2",
    "epas.max_shared=2",
    "echo.steps_per_stage=3",
    "echo.start=2",
    "echo.distillation=0.5",
]


@pytest.fixture
def tiny() -> list[str]:
    return list(TINY)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFCORE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def function_{i % 37}(x): return x + {i}\n" for i in range(400)))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and lose much to threads that wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
