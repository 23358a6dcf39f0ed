"""What the schedules of cross-layer sharing have in common: a layout as a function of the step, and its application.

    schedule = EPASSchedule.plan(num_layers=12, total_steps=3000)
    for step, batch in enumerate(batches):
        schedule.apply(model, optimizer, step)      # before the forward; does nothing but at a switch
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Trainer(..., callbacks=[schedule.callback()])   # the same, from a Hugging Face Trainer

A projection that its layer no longer uses stays in the model, but training leaves it alone: its gradient is None, so that the
optimizer skips it (weight decay included), and its optimizer state is dropped. When the region shrinks again the projection
starts with fresh state, as on the first step, and not with the momentum of a gradient from long ago.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from transformers import TrainerCallback


class SharingModel(Protocol):
    """What a schedule needs of a model (:class:`effcore.models.SharedLlamaForCausalLM` has it)."""

    @property
    def layout(self) -> object:
        """The owner of each layer's activations; as a string ``"0_1_2_2"``."""

    def set_layout(self, layout: str) -> object:
        """Switches layers to the activations of their owners, and back."""

    def switched_off_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Names and parameters of what the layout leaves unused."""


class SharingSchedule(ABC):
    """A sharing layout as a function of the training step. Subclasses are dataclasses whose fields are their settings."""

    num_layers: int
    _next_step: int = 0
    _current: str | None = None

    @abstractmethod
    def start(self, step: int) -> int:
        """The first layer that shares at ``step``, counted from 0; ``num_layers`` where none does."""

    @abstractmethod
    def switches(self) -> tuple[int, ...]:
        """The steps at which the layout changes, in ascending order."""

    def layout(self, step: int) -> str:
        """The layout of training step ``step`` as one owner per layer, ``"0_1_2_2"``."""
        start = self.start(step)
        return "_".join(str(layer if layer < start else start - 1) for layer in range(self.num_layers))

    def shared(self, step: int) -> int:
        """How many layers use another layer's activations at ``step``."""
        return sum(int(owner) != layer for layer, owner in enumerate(self.layout(step).split("_")))

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None, step: int | None = None) -> bool:
        """Gives the model the layout of ``step``, to be called before each step's forward. Cheap where nothing changes.

        Args:
            model: a :class:`SharingModel`, possibly inside DDP, torch.compile or PEFT wrappers.
            optimizer: loses its state of the parameters that go unused.
            step: None counts calls, from where :meth:`load_state_dict` put the schedule.

        Returns:
            Whether the layout changed.
        """
        step = self._next_step if step is None else step
        self._next_step = step + 1
        layout = self.layout(step)
        sharing: SharingModel = unwrap(model)
        changed = str(sharing.layout) != layout  # of this model: a schedule may serve several, one after the other
        if layout == self._current and not changed:
            return False
        if changed:
            sharing.set_layout(layout)
        leave_alone((parameter for _, parameter in sharing.switched_off_parameters()), optimizer)
        self._current = layout
        return changed

    def callback(self) -> TrainerCallback:
        """This schedule as a callback of the Hugging Face Trainer."""
        from effcore.methods.callback import EachStep

        return EachStep(lambda model, at, optimizer: self.apply(model, optimizer, at.global_step))

    def state_dict(self) -> dict[str, Any]:
        """The step that comes next, and the settings, to be compared on loading."""
        return {"next_step": self._next_step, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where another schedule with the same settings stood. :meth:`apply` then restores the layout.

        Raises:
            ValueError: the state belongs to a schedule with other settings, which are named.
        """
        ours, theirs = self._settings(), state["settings"]
        differing = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
        if differing:
            what = ", ".join(
                f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in sorted(differing)
            )
            raise ValueError(f"effcore.{type(self).__name__}: the state belongs to other settings ({what})")
        self._next_step = state["next_step"]
        self._current = None

    def _settings(self) -> dict[str, Any]:
        names = {entry.name for entry in fields(cast(Any, self)) if entry.init}
        return {name: value for name, value in asdict(cast(Any, self)).items() if name in names}


def unwrap(model: nn.Module) -> Any:
    """The :class:`SharingModel` inside wrappers (DDP, torch.compile, PEFT).

    Raises:
        TypeError: there is none; says how to make one.
    """
    inner: Any = model
    while not hasattr(type(inner), "set_layout"):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            raise TypeError(
                f"a sharing schedule needs a model that can share activations, got {type(inner).__name__}: "
                "convert it with effcore.share_activations(model, mode=...) first"
            )
    return inner


def leave_alone(parameters: Iterable[nn.Parameter], optimizer: Optimizer | None) -> None:
    """No gradient and no optimizer state for ``parameters``: optimizers skip a parameter whose ``grad`` is None."""
    state = (
        None if optimizer is None else getattr(optimizer, "optimizer", optimizer).state
    )  # Accelerate wraps optimizers
    for parameter in parameters:
        parameter.grad = None
        if state is not None:
            state.pop(parameter, None)
