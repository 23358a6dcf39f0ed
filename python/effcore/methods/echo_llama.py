r"""ECHO-LLaMA: a pretrained LLaMA becomes one whose upper layers share a KV cache (arXiv 2505.17331).

Layers below ``start`` keep their own keys and values; layers from ``start`` on compute queries alone and attend to the keys
and values of layer start−1. Conversion is gradual, so that pretrained weights carry over: ``start`` moves down by one layer a
stage,

    start(t) = max(final_start, L − 1 − ⌊(t − t₀) / steps_per_stage⌋)   for t ≥ t₀,   L before,

so that conversion takes (L − final_start) stages. Defaults as in a co-author's public checkpoints (TinyLlama v1.1): 150 steps a
stage. At the end the converted layers' Wk and Wv leave the checkpoint (:meth:`ECHOSchedule.finish`).

Ours: half the layers convert where nothing is said; and an optional distillation term, which for the length of its stage pulls
the output of the layer that converts towards what that layer would compute with its own keys and values:

    λ · ‖f(x; K,V of the owner) − f(x; own K,V)‖² / ‖f(x; own K,V) − x‖²

Own K,V come from the layer's frozen Wk, Wv and current other weights, without a gradient: no second model, nothing to save.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from effcore.methods.sharing import SharingSchedule, unwrap


@dataclass
class ECHOSchedule(SharingSchedule):
    """How ``start``, the first layer without keys and values of its own, moves down.

    Args:
        num_layers: L, layers of the model.
        final_start: where ``start`` ends; from 1 to L.
        steps_per_stage: steps between two conversions.
        first_stage: t₀, the step at which the last layer converts.
        distillation: λ; 0 turns the term off. A plain loop adds :meth:`extra_loss` to its loss, a subclass of the Hugging Face
            Trainer in ``compute_loss``; effcore's trainer does it itself.

    Raises:
        ValueError: a setting out of range.
    """

    num_layers: int
    final_start: int
    steps_per_stage: int = 150
    first_stage: int = 0
    distillation: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.final_start <= self.num_layers:
            raise ValueError(
                f"effcore.ECHOSchedule: final_start must be from 1 to {self.num_layers} layers, got {self.final_start}"
            )
        if self.steps_per_stage < 1:
            raise ValueError(f"effcore.ECHOSchedule: steps_per_stage must be positive, got {self.steps_per_stage}")
        if self.first_stage < 0:
            raise ValueError(f"effcore.ECHOSchedule: first_stage must not be negative, got {self.first_stage}")
        if self.distillation < 0:
            raise ValueError(f"effcore.ECHOSchedule: distillation must not be negative, got {self.distillation}")
        self._pull: _Distillation | None = None

    @classmethod
    def plan(
        cls,
        num_layers: int,
        total_steps: int,
        *,
        final_start: int | None = None,
        steps_per_stage: int | None = None,
        first_stage: int = 0,
        distillation: float = 0.0,
    ) -> ECHOSchedule:
        """The schedule of a run of ``total_steps``, with defaults for what is None.

        Half the layers convert, in 150 steps a stage, or in as many as let a shorter run end the conversion two thirds in.
        """
        if final_start is None:
            final_start = max(num_layers // 2, 1)
        if steps_per_stage is None:
            stages = max(num_layers - final_start, 1)
            steps_per_stage = min(150, max((2 * total_steps // 3 - first_stage) // stages, 1))
        return cls(num_layers, final_start, steps_per_stage, first_stage, distillation)

    def start(self, step: int) -> int:
        if step < self.first_stage:
            return self.num_layers
        return max(self.final_start, self.num_layers - 1 - (step - self.first_stage) // self.steps_per_stage)

    def switches(self) -> tuple[int, ...]:
        stages = self.num_layers - self.final_start
        return tuple(self.first_stage + self.steps_per_stage * stage for stage in range(stages))

    def converting(self, step: int) -> int | None:
        """The layer whose stage ``step`` falls in; None before the first stage and after the last."""
        stage = (step - self.first_stage) // self.steps_per_stage
        return self.num_layers - 1 - stage if 0 <= stage < self.num_layers - self.final_start else None

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None, step: int | None = None) -> bool:
        changed = super().apply(model, optimizer, step)
        if self.distillation:
            layer = self.converting(self._next_step - 1)
            module = None if layer is None else unwrap(model).model.layers[layer]
            if self._pull is not None and self._pull.module is not module:
                self._pull.remove()
                self._pull = None
            if self._pull is None and module is not None:
                self._pull = _Distillation(module)
        return changed

    apply.__doc__ = SharingSchedule.apply.__doc__

    def extra_loss(self) -> Tensor | None:
        """The distillation term of the last forward, float32 [], to be added to the loss; None outside a stage.

        Each forward's term can be taken once.
        """
        term = None if self._pull is None else self._pull.take()
        return None if term is None else self.distillation * term

    def finish(self, model: nn.Module) -> None:
        """Drops the projections that the model's layout no longer uses, for good: they are not in its checkpoints any more."""
        sharing: CompressibleModel = unwrap(model)
        sharing.drop_unused_projections()
        if self._pull is not None:
            self._pull.remove()
            self._pull = None


class CompressibleModel(Protocol):
    """What :meth:`ECHOSchedule.finish` needs of a model."""

    def drop_unused_projections(self) -> object:
        """Removes the parameters that the layout leaves unused."""


class _Distillation:
    """Compares a layer that uses another layer's keys and values with itself using its own."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._signature = inspect.signature(module.forward)
        self._own: Tensor | None = None
        self._term: Tensor | None = None
        self._warned = False
        # The own output is computed before the layer runs: FSDP2 has gathered its weights then, and frees them after.
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def take(self) -> Tensor | None:
        term, self._term = self._term, None
        return term

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._own = self._term = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._signature.bind(*args, **kwargs)
        self._own = None
        if not module.training or not torch.is_grad_enabled() or call.arguments.get("shared") is None:
            return
        call.arguments.update(shared=None, consumers=0, cache=None)
        with torch.no_grad():
            self._own = module.forward(*call.args, **call.kwargs)[0]

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self._own is None:
            return
        entering = self._signature.bind(*args, **kwargs).args[0]
        own, self._own = self._own.float(), None
        change = (own - entering.detach().float()).square().mean()
        term = (result[0].float() - own).square().mean() / change.clamp_min(1e-12)
        if torch._C._current_graph_task_id() != -1:
            return  # the backward makes a checkpointed layer's activations again; its term was taken
        if self._term is not None and not self._warned:
            self._warned = True
            warnings.warn(
                "effcore.ECHOSchedule: the distillation term of a forward was added to no loss; add schedule.extra_loss() to "
                "it (with the Hugging Face Trainer in compute_loss), or leave distillation at 0",
                stacklevel=2,
            )
        self._term = term
