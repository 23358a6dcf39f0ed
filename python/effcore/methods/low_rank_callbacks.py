r"""What happens to factors while they train: freezing, sequential freezing, progressive decomposition.

Plain objects with ``apply(model, step, epoch)``, to be called before each optimizer step; ``callback()`` makes a callback of
the Hugging Face Trainer of any of them.

    freezing               of two factors the first stays, of three both 1×1s: their gradients are not computed (2407.20266)
    sequential freezing    the frozen and the training factors change places every epoch (2309.03824)
    progressive            what a decomposition cuts off fades while the model trains. Or in stages, without fading
                           (2407.20266): 2× and recover, again and again: W ≈ up · down; up ≈ up' · m, down' = m · down
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from effcore.methods._gather import Processes
from effcore.methods.low_rank import decompose
from effcore.methods.low_rank_factor import MatrixFactors
from effcore.methods.low_rank_fading import Fading, fade, set_share, settle
from effcore.methods.low_rank_layers import Rank, freeze, replace
from effcore.methods.low_rank_ranks import snap
from effcore.nn.low_rank import LowRankLinear


class _Schedule(ABC):
    @abstractmethod
    def apply(self, model: nn.Module, step: int, epoch: float, optimizer: Optimizer | None = None) -> None:
        """Changes the model as the schedule has it at this step."""

    def callback(self) -> Any:
        """As a ``TrainerCallback``."""
        from effcore.methods.callback import EachStep

        return EachStep(
            lambda model, at, optimizer: self.apply(model, at.global_step, at.epoch or 0.0, optimizer), self.finish
        )

    def finish(self, model: nn.Module) -> None:  # noqa: B027 (most have nothing to do)
        """What is left to do when training ends; the callback does it, a loop of one's own calls it."""


@dataclass
class Freezing(_Schedule):
    """The outer factors keep what the decomposition gave them, for all of the training. Under DDP freeze before wrapping the
    model, or give it ``find_unused_parameters=True``."""

    def apply(self, model: nn.Module, step: int, epoch: float, optimizer: Optimizer | None = None) -> None:
        freeze(model)


@dataclass
class SequentialFreezing(_Schedule):
    """Outer factors are frozen in even periods, inner ones in odd periods. DDP needs ``find_unused_parameters=True``.

    Args:
        period: in epochs.
    """

    period: float = 1.0

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise ValueError(f"effcore.SequentialFreezing: period must be positive, got {self.period}")
        self._phase: int | None = None

    def apply(self, model: nn.Module, step: int, epoch: float, optimizer: Optimizer | None = None) -> None:
        phase = math.floor(epoch / self.period + 1e-9) % 2
        if phase == self._phase:
            return
        self._phase = phase
        freeze(model, phase == 0)
        freeze(model, phase == 1, inner=True)


@dataclass
class ProgressiveDecomposition(_Schedule):
    """Decomposes, lets what was cut off fade while the model trains, and goes on from the factors.

    Args:
        ratios: how far each stage shrinks the layers, for instance (2, 2): a half, then a quarter.
        every: steps between stages; the first is at ``start``.
        options: for :func:`effcore.decompose` at the first stage (include, exclude, data, multiple).
        fade: what a stage cuts off falls linearly to nothing over ``every`` steps
            (:mod:`effcore.methods.low_rank_fading`); with it one ratio is enough. False: it is gone at once, as in the paper.

    A stage replaces parameters. With ``apply(..., optimizer)`` (the callback hands it over) the optimizer's groups are given
    the new ones, whose moments begin anew. Train past the last stage by more than ``every`` steps, a tenth or a fifth of the
    whole: only then do the factors stand alone. When the Trainer ends earlier, its callback drops what is left; in a loop
    ``finish(model)`` does. Until then the model is larger than it was and ``save_decomposed`` refuses it, and
    checkpoints of the Trainer have the names of what fades.

    In several processes a stage must come before the model is wrapped (``apply`` without an optimizer): DDP adds up the
    gradients of the parameters that it was given, and would let the new ones go apart.

    Raises:
        ValueError: a setting out of range.
        RuntimeError: a stage with an optimizer, or of a wrapped model, in several processes.
    """

    ratios: tuple[float, ...]
    every: int
    start: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    fade: bool = True

    def __post_init__(self) -> None:
        if not self.ratios or any(not r > 1 for r in self.ratios):
            raise ValueError(f"effcore.ProgressiveDecomposition: ratios must be above 1, got {self.ratios}")
        if self.every < 1 or self.start < 0:
            raise ValueError(
                "effcore.ProgressiveDecomposition: every must be positive and start not negative, "
                f"got {self.every} and {self.start}"
            )
        self.stage = 0
        self.fading = False

    def finish(self, model: nn.Module) -> None:
        settle(model)
        self.fading = False

    def apply(self, model: nn.Module, step: int, epoch: float, optimizer: Optimizer | None = None) -> None:
        wanted = 0 if step < self.start else min(len(self.ratios), (step - self.start) // self.every + 1)
        if wanted > self.stage:
            self._decompose(model, wanted, optimizer)
        if self.fading:
            begun = self.start + (self.stage - 1) * self.every
            share = 1 - (step - begun + 1) / (self.every + 1)
            set_share(model, max(0.0, share))
            if step >= begun + self.every:
                settle(model)
                self.fading = False

    def _decompose(self, model: nn.Module, wanted: int, optimizer: Optimizer | None) -> None:
        if Processes().count > 1 and (optimizer is not None or isinstance(model, DistributedDataParallel)):
            raise RuntimeError(
                "effcore.ProgressiveDecomposition: a stage replaces parameters, and what has wrapped the model (DDP, FSDP) "
                "would not add up the gradients of the new ones; train in one process, or apply all stages before wrapping it"
            )
        settle(model)
        old, layers = dict(model.named_parameters()), dict(model.named_modules())
        while self.stage < wanted:
            if self.stage == 0:
                decompose(model, ratio=self.ratios[0], **self.options)
            else:
                shrink(model, self.ratios[self.stage], multiple=self.options.get("multiple"))
            self.stage += 1
        if self.fade:
            fade(model, layers)
            self.fading = True
        if optimizer is not None:
            _hand_over(optimizer, old, model)


@torch.no_grad()
def shrink(
    model: nn.Module, ratio: float, *, multiple: int | None = None, only: Iterable[str] | None = None
) -> list[str]:
    """Decomposes every LowRankLinear again, to 1 / ratio of its rank: the second factor by SVD, folded into the first.

    With the columns of ``up`` in the coordinates in which ``down`` is orthonormal (QR), this is the truncated SVD of up · down
    itself. Returns the names of the layers.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear) and (only is None or n in set(only))]
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        rank: Rank = snap(max(1, int(layer.rank / ratio)), multiple or 1)
        assert isinstance(rank, int)
        q, r = torch.linalg.qr(layer.down.double().T)  # down = rᵀ qᵀ
        down, up = MatrixFactors.of(layer.up.double() @ r.T).split(rank)
        new = LowRankLinear(
            layer.in_features,
            layer.out_features,
            rank,
            layer.bias is not None,
            device=layer.down.device,
            dtype=layer.down.dtype,
        )
        new.down.copy_(down @ q.T)
        new.up.copy_(up)
        if new.bias is not None and layer.bias is not None:
            new.bias.copy_(layer.bias)
        for a, b in zip(new.parameters(), layer.parameters(), strict=True):
            a.requires_grad_(b.requires_grad)
        replace(model, name, new.train(layer.training))
    return names


def _hand_over(optimizer: Optimizer, old: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Parameters that are gone leave the optimizer; new ones join the group of the layer that they replace."""
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    rests = {id(p) for m in model.modules() if isinstance(m, Fading) for p in m.rest.parameters()}  # do not train
    now = {n: p for n, p in model.named_parameters() if id(p) not in rests}
    kept = {id(p) for p in now.values()}
    home = {name.rpartition(".")[0]: group_of[id(p)] for name, p in old.items() if id(p) in group_of}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in kept:
                optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) in kept]
    for name, p in now.items():
        if id(p) in group_of:
            continue
        owner = name.rpartition(".")[0]
        while owner and owner not in home:
            owner = owner.rpartition(".")[0]
        home.get(owner, optimizer.param_groups[0])["params"].append(p)
