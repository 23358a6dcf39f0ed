r"""EPAS: efficient training with progressive activation sharing (arXiv 2601.19089).

Training starts with all L layers full. Every I steps the next B layers, from the deep end towards the shallow end, switch to
the activations (Q,K or K,V) of the layer before them:

    shared(t) = min(R, B · ⌊(t − t₀) / I⌋)

With one contiguous region, every shared layer uses those of the deepest full layer. No parameter is added, and the trained
model serves any region up to R at inference.

Ours, where the paper is silent: R = ⌈2L/3⌉ layers, B = 1, and I such that R is reached a third into training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from effcore.methods.sharing import SharingSchedule


@dataclass
class EPASSchedule(SharingSchedule):
    """How the region of shared layers grows.

    Args:
        num_layers: L, layers of the model.
        switch_every: I, steps between switches.
        max_shared: R, layers that share in the end; below L, as layer 0 has nothing to share.
        layers_per_switch: B.
        first_switch: t₀; the first layers switch I steps later.
        restart_steps: after each switch the learning rate climbs from ``restart_from`` times its value back to it in so many
            steps (warm restarts). 0, the default, leaves it alone.

    Raises:
        ValueError: a setting out of range.
    """

    num_layers: int
    switch_every: int
    max_shared: int
    layers_per_switch: int = 1
    first_switch: int = 0
    restart_steps: int = 0
    restart_from: float = 0.1

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"effcore.EPASSchedule: num_layers must be positive, got {self.num_layers}")
        if not 0 <= self.max_shared < self.num_layers:
            raise ValueError(
                f"effcore.EPASSchedule: max_shared must be from 0 to {self.num_layers - 1} with {self.num_layers} layers, "
                f"got {self.max_shared}"
            )
        for name in ("switch_every", "layers_per_switch"):
            if getattr(self, name) < 1:
                raise ValueError(f"effcore.EPASSchedule: {name} must be positive, got {getattr(self, name)}")
        for name in ("first_switch", "restart_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"effcore.EPASSchedule: {name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.restart_from <= 1:
            raise ValueError(f"effcore.EPASSchedule: restart_from must be from 0 to 1, got {self.restart_from}")
        self._hooked: Optimizer | None = None

    @classmethod
    def plan(
        cls,
        num_layers: int,
        total_steps: int,
        *,
        max_shared: int | None = None,
        layers_per_switch: int = 1,
        switch_every: int | None = None,
        first_switch: int = 0,
        **restarts: Any,
    ) -> EPASSchedule:
        """The schedule of a run of ``total_steps``, with defaults for what is None: R = ⌈2L/3⌉, reached a third into it.

        A run with fewer steps than that takes switches every step and may end with fewer shared layers.
        """
        if max_shared is None:
            max_shared = min(math.ceil(2 * num_layers / 3), num_layers - 1)
        if switch_every is None:
            switches = max(math.ceil(max_shared / max(layers_per_switch, 1)), 1)
            switch_every = max((total_steps // 3 - first_switch) // switches, 1)
        return cls(num_layers, switch_every, max_shared, layers_per_switch, first_switch, **restarts)

    def shared(self, step: int) -> int:
        """shared(t), the paper's equation."""
        switches = max(step - self.first_switch, 0) // self.switch_every
        return min(self.max_shared, self.layers_per_switch * switches)

    def start(self, step: int) -> int:
        return self.num_layers - self.shared(step)

    def switches(self) -> tuple[int, ...]:
        count = math.ceil(self.max_shared / self.layers_per_switch)
        return tuple(self.first_switch + self.switch_every * number for number in range(1, count + 1))

    def learning_rate_factor(self, step: int) -> float:
        """What a warm restart multiplies the learning rate by: 1 unless a switch is less than ``restart_steps`` ago."""
        last = max((switch for switch in self.switches() if switch <= step), default=None)
        if not self.restart_steps or last is None:
            return 1.0
        return min(1.0, self.restart_from + (1 - self.restart_from) * (step - last) / self.restart_steps)

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None, step: int | None = None) -> bool:
        changed = super().apply(model, optimizer, step)
        if self.restart_steps and optimizer is not None:
            self._restart_with(getattr(optimizer, "optimizer", optimizer))
        return changed

    apply.__doc__ = SharingSchedule.apply.__doc__

    def _restart_with(self, optimizer: Optimizer) -> None:
        """Scales the learning rate inside ``optimizer.step`` alone, so that every learning-rate scheduler stays right."""
        if self._hooked is optimizer:
            return
        rates: list[Any] = []

        def scale(optimizer: Optimizer, *_: Any) -> None:
            factor = self.learning_rate_factor(self._next_step - 1)
            rates[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

        def restore(optimizer: Optimizer, *_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        optimizer.register_step_pre_hook(scale)
        optimizer.register_step_post_hook(restore)
        self._hooked = optimizer


@dataclass
class StaticSchedule(SharingSchedule):
    """One layout from the first step on: EchoAtt's and CLA's blocks, or a region that does not grow.

        StaticSchedule("0_0_2_2_4_4")

    Raises:
        ValueError: the layout has no owner for a layer, or one that points forward (from the model, on applying it).
    """

    fixed: str

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        return len(self.fixed.split("_"))

    def layout(self, step: int) -> str:
        return self.fixed

    def start(self, step: int) -> int:
        return next((i for i, owner in enumerate(self.fixed.split("_")) if int(owner) != i), self.num_layers)

    def switches(self) -> tuple[int, ...]:
        return (0,) if self.start(0) < self.num_layers else ()
