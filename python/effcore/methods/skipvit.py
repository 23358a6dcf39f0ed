"""SkipViT: patches that matter little skip some blocks of a vision transformer (token-level skip connection).

    model = effcore.skip_tokens(model, drop=0.55, leave=6, rejoin=10)

After block ``leave - 1`` the patches to which the class token attended least leave; blocks ``leave`` to ``rejoin - 1`` run on
the others; then all are together again, each at its place. No parameters are added and the state dict stays as it is.

Blocks are counted from 0. The class token, distillation and register tokens never leave. How many patches stay,
N - ⌊drop · N⌋, depends on shapes alone, so a model has two compiled graphs at most: with and without skipping.

    warmup = SkipWarmup(steps=5000)                  # first train on all tokens
    model = effcore.skip_tokens(model, warmup=warmup)
    for step, batch in enumerate(batches):
        warmup.apply(model, step=step)
        ...
    Trainer(..., callbacks=[warmup.callback()])      # the same
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effcore.methods import vit_blocks
from effcore.methods.skip_stages import Stage, plan_stages
from effcore.ops import _routing_lookup, routing

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["Skip", "SkipWarmup", "Stage", "keep_all_tokens", "skip_tokens", "skipped_patches", "skipping"]

SCORES: dict[str, Callable[[nn.Module, Tensor, int, int], tuple[Tensor, Tensor]]] = {
    "class": vit_blocks.class_partition,
    "mean": vit_blocks.mean_partition,
    "random": vit_blocks.random_partition,
}


# A named argument of blocks: their mask is one by which all tokens see all.
ALL_VISIBLE = "effcore_all_visible"


class Skip:
    """What a model skips, and whether it does at present. Blocks refer to it, so a change reaches all of them.

    Attributes:
        active: False runs every block on all tokens (warm-up).
        inference: whether patches skip in eval mode too.
    """

    def __init__(self, stages: tuple[Stage, ...], scores: str, prefix: int, inference: bool, warmup: SkipWarmup | None):
        self.stages, self.scores, self.prefix, self.inference, self.warmup = stages, scores, prefix, inference, warmup
        self.active = warmup is None or warmup.over(0, 0.0)
        self.trace: list[tuple[Tensor, Tensor]] | None = None

    def on(self, training: bool) -> bool:
        return self.active and (training or self.inference)

    def __repr__(self) -> str:
        return f"Skip({', '.join(map(str, self.stages))}, scores={self.scores!r}, active={self.active})"


def skip_tokens(
    model: nn.Module,
    drop: float = 0.55,
    leave: int = 6,
    rejoin: int = 10,
    *,
    stages: Sequence[tuple[int, float] | tuple[int, float, int]] | None = None,
    warmup: SkipWarmup | int | None = None,
    scores: str = "auto",
    inference: bool = True,
    inplace: bool = True,
) -> nn.Module:
    """Lets the patches that matter least skip blocks of a vision transformer (SkipViT).

    Patch n is worth the head mean of softmax(q_cls Kᵀ / √d)ₙ in block ``leave - 1``, computed as one row beside the block's own
    attention. Its rank carries no gradient; skipped tokens get theirs through the skip.

    Args:
        model: a Hugging Face ViT or DeiT model, or a timm VisionTransformer. Converted before: the settings change.
        drop: share of the patches that leave; N - ⌊drop · N⌋ stay.
        leave: the first block that runs without them, counted from 0; at least 1.
        rejoin: the first block that runs on all again; the number of blocks: they rejoin at the end.
        stages: instead of drop and leave, any list of ``(leave, drop)``, whose patches all come back at ``rejoin`` (a later
            stage drops a share of those that are still there), or of ``(leave, drop, rejoin)``.
        warmup: begin with all tokens: a :class:`SkipWarmup`, to be applied during training, or a number of steps.
        scores: ``"class"``, ``"mean"`` (attention from all tokens, for models that pool), ``"random"`` (to compare with), or
            ``"auto"``: class where a class token is read out, or else mean.
        inference: whether patches also skip in eval mode.
        inplace: False converts a copy.

    Returns:
        The model. :func:`keep_all_tokens` undoes it; :func:`skipping` gives the settings that can change.

    Raises:
        TypeError: another kind of model; says which are supported. Or an argument of another type; named.
        ValueError: an argument out of range, or stages that overlap; named.
    """
    architecture = vit_blocks.architecture(model)
    blocks = list(architecture.blocks.children())
    plan = plan_stages(drop, leave, rejoin, stages, len(blocks))
    if scores != "auto" and scores not in SCORES:
        raise ValueError(f"effcore.skip_tokens: scores must be one of auto, {', '.join(SCORES)}, got {scores!r}")
    if scores == "class" and architecture.prefix == 0:
        raise ValueError(
            f"effcore.skip_tokens: scores='class' needs a class token, which this {type(model).__name__} has not"
        )
    if isinstance(warmup, int):
        warmup = SkipWarmup(steps=warmup)
    if not isinstance(warmup, SkipWarmup | None):
        raise TypeError(f"effcore.skip_tokens: warmup must be a SkipWarmup or a number of steps, got {warmup!r}")
    if not inplace:
        model = copy.deepcopy(model)
    keep_all_tokens(model)
    architecture = vit_blocks.architecture(model)
    blocks = list(architecture.blocks.children())
    scores = ("class" if architecture.class_token else "mean") if scores == "auto" else scores
    skip = Skip(plan, scores, architecture.prefix, inference, warmup)
    for number in range(plan[0].leave - 1, max(stage.rejoin for stage in plan)):
        begins = next((stage for stage in plan if stage.leave - 1 == number), None)
        inside = any(stage.leave - 1 <= number < stage.rejoin for stage in plan)
        if inside:
            _take_part(blocks[number], _Part(skip, begins, sum(stage.rejoin - 1 == number for stage in plan)))
    if architecture.masking is not None:
        _mix(_MakesMasks, architecture.masking)
    return model


def keep_all_tokens(model: nn.Module) -> nn.Module:
    """Undoes :func:`skip_tokens`: the model is what it was, with the parameters that it has now."""
    for module in model.modules():
        if isinstance(module, _SkippingBlock | vit_blocks.Shared | _MakesMasks):
            if type(module) not in _plain:
                raise TypeError(
                    f"effcore.keep_all_tokens: {type(module).__name__} wraps a block; undo it before wrapping the model"
                )
            if isinstance(module, _SkippingBlock):
                del module._skip
            elif isinstance(module, vit_blocks.Shared):
                del module._shared
            module.__class__ = _plain[type(module)]
    return model


def skipping(model: nn.Module) -> Skip:
    """The settings of a converted model; ``skipping(model).inference = False`` keeps all tokens in eval mode.

    Raises:
        ValueError: nothing skips in this model.
    """
    for block in model.modules():
        if isinstance(block, _SkippingBlock):
            return block._skip.skip
    raise ValueError(
        f"effcore.skipping: no tokens skip in this {type(model).__name__}; call effcore.skip_tokens(model) first"
    )


@torch.no_grad()
def skipped_patches(model: nn.Module, *inputs: Any, **named_inputs: Any) -> list[Tensor]:
    """Which patches a forward skips, for each stage a mask [B, patches] (of the patches that the stage began with)."""
    skip = skipping(model)
    skip.trace, before = [], (skip.active, skip.inference)
    skip.active = skip.inference = True
    try:
        model(*inputs, **named_inputs)
        trace = skip.trace
    finally:
        skip.trace = None
        skip.active, skip.inference = before
    masks = []
    for kept, rest in trace:
        mask = torch.zeros(kept.shape[0], kept.shape[1] + rest.shape[1], dtype=torch.bool, device=kept.device)
        masks.append(mask.scatter_(1, rest.long(), True)[:, skip.prefix :])
    return masks


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class _Part:
    """A block's part: after it a stage may begin, and so many end."""

    skip: Skip
    begins: Stage | None
    ends: int


# What a rejoin needs: (skipped tokens, kept, rest), or (all tokens, kept, rest) where they were looked up.
_Apart = tuple[Tensor, Tensor, Tensor]


def _lookups(x: Tensor) -> bool:
    """Whether a compiler of GPU code sees this forward, and no gradient will want its way back."""
    return x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _part_with(x: Tensor, kept: Tensor, rest: Tensor) -> tuple[Tensor, _Apart]:
    if _lookups(x):
        return _routing_lookup.leave(x, kept), (x, kept, rest)
    x, skipped = routing.separate_tokens(x, kept, rest)
    return x, (skipped, kept, rest)


def _come_back(x: Tensor, apart: _Apart) -> Tensor:
    skipped, kept, rest = apart
    if skipped.shape[1] != rest.shape[1]:
        return _routing_lookup.rejoin(x, skipped, kept, rest)
    return routing.merge_tokens(x, kept, skipped.to(x.dtype), rest)


class _SkippingBlock(nn.Module):
    """Mixed into the class of a block. From the block where tokens leave to the one where they rejoin, blocks pass on
    ``(tokens, (what is apart, ...))`` instead of a tensor: what one forward needs travels with it, and is in no
    attribute, so that checkpointing, compilation and several forwards at once see plain functions.
    """

    _skip: _Part

    def forward(self, hidden_states, *args: Any, **kwargs: Any):
        part = self._skip
        carried = isinstance(hidden_states, tuple)
        if not carried and (part.begins is None or not part.skip.on(self.training)):
            return super().forward(hidden_states, *args, **kwargs)
        if kwargs.pop(ALL_VISIBLE, False):
            args, kwargs = _without_masks(args, kwargs)
        _refuse_masks(args, kwargs)
        _refuse_reentrant_checkpointing(self)
        x: Tensor = hidden_states[0] if carried else hidden_states
        away: tuple[_Apart, ...] = hidden_states[1] if carried else ()
        kept = rest = None
        if part.begins is not None:
            prefix = part.skip.prefix
            keep = prefix + part.begins.kept_patches(x.shape[1] - prefix)
            kept, rest = SCORES[part.skip.scores](self, x, keep, prefix)
            if part.skip.trace is not None:
                part.skip.trace.append((kept, rest))
        try:
            x = super().forward(x, *args, **kwargs)
        finally:
            if kept is not None:
                vit_blocks.forget(self)
        for _ in range(part.ends):
            x = _come_back(x, away[-1])
            away = away[:-1]
        if kept is not None and rest is not None:
            x, apart = _part_with(x, kept, rest)
            away = (*away, apart)
        return (x, away) if away else x

    def extra_repr(self) -> str:
        begins = self._skip.begins
        return super().extra_repr() + (
            f"then {begins.drop:.0%} of the patches skip blocks {begins.leave} to {begins.rejoin - 1}" if begins else ""
        )


_classes: dict[tuple[type, type], type] = {}  # plain class and mixin -> both in one
_plain: dict[type, type] = {}  # and back


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    """For pickle and deepcopy, which would look the mixed class up by its name and find the plain one."""
    mixed = type(module)
    return _unpickled, (mixed.__bases__[0], _plain[mixed]), module.__getstate__()


def _unpickled(mixin: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    _mix(mixin, module)
    return module


def _mix(mixin: type[nn.Module], module: nn.Module) -> None:
    """Gives the module a class of the same name: parameters, hooks and state dict stay, and wrapping by class name works."""
    cls = type(module)
    if (cls, mixin) not in _classes:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce__": _reduce}
        _classes[cls, mixin] = type(cls.__name__, (mixin, cls), names)
        _plain[_classes[cls, mixin]] = cls
    module.__class__ = _classes[cls, mixin]


def _take_part(block: nn.Module, part: _Part) -> None:
    if part.begins is not None:
        for module in vit_blocks.shared_modules(block):
            _mix(vit_blocks.Shared, module)
        vit_blocks.forget(block)
    _mix(_SkippingBlock, block)
    block._skip = part  # type: ignore[assignment]


class _MakesMasks(nn.Module):
    """Mixed into the class of the Hugging Face model around the blocks. Where it is exported (with torch before 2.12 also
    where it is compiled) it makes a mask for them even if it was given none, by which all tokens see all. This says so to the
    blocks; without it they refuse a mask."""

    def forward(self, *args: Any, **kwargs: Any):
        if torch.compiler.is_compiling() and len(args) < 2 and kwargs.get("attention_mask") is None:
            kwargs[ALL_VISIBLE] = True
        return super().forward(*args, **kwargs)


def _without_masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(None if isinstance(a, Tensor) else a for a in args)
    return args, kwargs | ({"attention_mask": None} if "attention_mask" in kwargs else {})


def _refuse_masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    masks = [*args, *(value for name, value in kwargs.items() if "mask" in name)]
    if any(isinstance(mask, Tensor) for mask in masks):
        raise ValueError("effcore.skip_tokens: blocks that run without some tokens take no attention mask")


def _refuse_reentrant_checkpointing(block: nn.Module) -> None:
    if not (block.training and getattr(block, "gradient_checkpointing", False)):
        return
    function = getattr(block, "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "effcore.skip_tokens: gradient checkpointing with use_reentrant=True loses the gradient of skipped tokens; "
            "use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


# ---------------------------------------------------------------- warm-up


@dataclass
class SkipWarmup:
    """Training on all tokens at first: for so many steps and so many epochs, whichever ends later.

    Raises:
        ValueError: a negative setting.
    """

    steps: int = 0
    epochs: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"effcore.SkipWarmup: {name} must not be negative, got {getattr(self, name)}")
        self._next_step = 0

    def over(self, step: int, epoch: float) -> bool:
        """Whether patches skip at this step (from 0) of this epoch (from 0, in fractions)."""
        return step >= self.steps and epoch >= self.epochs

    def apply(self, model: nn.Module, step: int | None = None, epoch: float | None = None) -> bool:
        """Switches skipping on once the warm-up is over, to be called before each step's forward.

        Args:
            model: possibly inside DDP, torch.compile or other wrappers.
            step: None counts calls, from where :meth:`load_state_dict` put the warm-up.
            epoch: needed where the warm-up is in epochs.

        Returns:
            Whether it changed.
        """
        step = self._next_step if step is None else step
        self._next_step = step + 1
        if self.epochs and epoch is None:
            raise ValueError(
                "effcore.SkipWarmup: the warm-up is in epochs, so apply(model, epoch=...) must say which this is"
            )
        skip = skipping(model)
        active = self.over(step, 0.0 if epoch is None else epoch)
        changed = skip.active != active
        if changed:
            skip.active = active
        return changed

    def callback(self) -> TrainerCallback:
        """This warm-up as a callback of the Hugging Face Trainer."""
        from effcore.methods.callback import EachStep

        return EachStep(lambda model, at, _: self.apply(model, at.global_step, at.epoch or 0.0))

    def state_dict(self) -> dict[str, Any]:
        """How many calls :meth:`apply` has counted."""
        return {"next_step": self._next_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting from there."""
        self._next_step = state["next_step"]
