"""What a few batches tell of a model's layers: the shapes that they see, their inputs' second moments, and their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from effcore.methods._surroundings import evaluating
from effcore.methods.low_rank_layers import Layer

AHEAD, LONGEST = 1_000_000, 64_000_000  # cycles that a GPU is kept busy with: half a millisecond, and 30


@dataclass
class Seen:
    """What one layer was called with. ``shape`` is that of the largest input; ``calls`` counts one forward pass."""

    shape: tuple[int, ...] = ()
    calls: int = 0
    channels_last: bool = False
    moments: Tensor | None = None
    samples: int = 0


def run(model: nn.Module, batch: Any) -> Any:
    """model(**batch), model(*batch) or model(batch), on the model's device."""
    device = next(model.parameters()).device
    move = lambda t: t.to(device) if isinstance(t, Tensor) else t  # noqa: E731
    if isinstance(batch, Mapping):
        return model(**{k: move(v) for k, v in batch.items()})
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*map(move, batch))
    return model(move(batch))


def _samples(x: Tensor, kind: str) -> Tensor:
    """Inputs of a layer as [samples, channels]."""
    return x.movedim(1, -1).flatten(0, -2) if kind in ("pointwise", "conv") else x.reshape(-1, x.shape[-1])


def observe(model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], *, moments: bool) -> dict[str, Seen]:
    """Runs the batches through the model in evaluation mode; a layer that no batch reached is not in the result."""
    seen: dict[str, Seen] = {}

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            record = seen.setdefault(layer.name, Seen())
            if record.shape == () or x.numel() > torch.Size(record.shape).numel():
                record.shape = tuple(x.shape)
                record.channels_last = (
                    x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
                )
            if first:
                record.calls += 1
            if moments:
                rows = _samples(x, layer.kind)
                # Products in float32 of the inputs' own numbers, sums over batches in float64.
                part = (rows.float().T @ rows.float()).double()
                record.moments = part if record.moments is None else record.moments + part
                record.samples += rows.shape[0]

        return hook

    handles = [layer.module.register_forward_pre_hook(watch(layer)) for layer in layers]
    first = True
    try:
        with evaluating(model):
            for batch in data:
                run(model, batch)
                first = False
    finally:
        for handle in handles:
            handle.remove()
    if first:
        raise ValueError("effcore.decompose: data gave no batch")
    for record in seen.values():
        if record.moments is not None:
            record.moments /= max(record.samples, 1)
    return seen


@dataclass
class Clock:
    """Milliseconds of layers on inputs of the seen shapes, each layer shape and rank once.

    Args:
        training: forward and backward instead of forward alone.
    """

    training: bool = False
    least: int = 7
    seconds: float = 0.02
    _times: dict[Any, float] = field(default_factory=dict)

    def __call__(self, key: Any, module: nn.Module, seen: Seen) -> float:
        """The median over at least ``least`` runs and about ``seconds``; of one call of the layer."""
        weight = next(module.parameters())
        key = (key, seen.shape, seen.channels_last, weight.dtype, weight.device, self.training)
        if key not in self._times:
            self._times[key] = self._measure(module, seen, weight)
        return self._times[key]

    def _measure(self, module: nn.Module, seen: Seen, weight: Tensor) -> float:
        x = torch.randn(seen.shape, device=weight.device, dtype=weight.dtype)
        if seen.channels_last:
            x = x.to(memory_format=torch.channels_last)
        if self.training:
            x.requires_grad_()
        cuda = weight.is_cuda

        def once() -> None:
            with torch.set_grad_enabled(self.training):
                out = module(x)
                if self.training:
                    torch.autograd.grad(out, [x, *(p for p in module.parameters() if p.requires_grad)], out)

        times: list[float] = []
        ahead = AHEAD
        for _ in range(2):
            once()
        begin = time.perf_counter()
        while len(times) < self.least or (time.perf_counter() - begin < self.seconds and len(times) < 100):
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(ahead)  # while the host launches: the time is to be the kernels'
                start.record()
                once()
                end.record()
                late = start.query()
                end.synchronize()
                if late and ahead < LONGEST:  # a busy host: the GPU has waited for it
                    ahead *= 2
                else:
                    times.append(start.elapsed_time(end))
            else:
                at = time.perf_counter()
                once()
                times.append((time.perf_counter() - at) * 1e3)
        return median(times)


def shape_key(layer: Layer) -> tuple[Any, ...]:
    """Layers with equal keys take equal time on equal inputs."""
    m: Any = layer.module
    conv = (m.stride, m.padding, m.dilation) if isinstance(m, nn.Conv2d) else ()
    return layer.kind, tuple(layer.weight.shape), conv, layer.bias is not None
