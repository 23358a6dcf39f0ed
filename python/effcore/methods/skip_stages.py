"""Which patches of a vision transformer skip which blocks: stages, one after the other or one inside another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Stage:
    """Blocks ``leave`` to ``rejoin - 1`` run without the share ``drop`` of the patches that are there."""

    leave: int
    rejoin: int
    drop: float

    def kept_patches(self, patches: int) -> int:
        """How many of so many patches stay."""
        return patches - int(self.drop * patches + 1e-9)  # 0.29 * 100 is 28.999...


def plan_stages(drop: float, leave: int, rejoin: int, stages: Iterable[tuple] | None, blocks: int) -> tuple[Stage, ...]:
    """The stages that :func:`effcore.skip_tokens` was asked for, by their first blocks; arguments as there.

    Raises:
        TypeError, ValueError: an argument of another type, out of range, or stages that overlap; named.
    """
    function = "effcore.skip_tokens"
    plan = []
    for given in [(leave, drop)] if stages is None else stages:
        if not isinstance(given, tuple | list) or len(given) not in (2, 3):
            raise ValueError(f"{function}: a stage is (leave, drop) or (leave, drop, rejoin), got {given!r}")
        plan.append(Stage(given[0], given[2] if len(given) == 3 else rejoin, given[1]))
    if not plan:
        raise ValueError(f"{function}: stages must hold at least one stage")
    for stage in plan:
        for name, kind, value in (
            ("drop", Real, stage.drop),
            ("leave", Integral, stage.leave),
            ("rejoin", Integral, stage.rejoin),
        ):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{function}: {name} must be {'a number' if kind is Real else 'an int'}, got {value!r}")
        if not 0 <= stage.drop < 1:
            raise ValueError(f"{function}: drop must be at least 0 and below 1, got {stage.drop}")
        if stage.leave < 1:
            raise ValueError(
                f"{function}: leave must be at least 1 (block leave - 1 gives the scores), got {stage.leave}"
            )
        if stage.rejoin > blocks:
            raise ValueError(f"{function}: rejoin must be at most {blocks}, the number of blocks, got {stage.rejoin}")
        if stage.leave >= stage.rejoin:
            raise ValueError(f"{function}: leave must be below rejoin, got {stage.leave} and {stage.rejoin}")
    plan.sort(key=lambda stage: (stage.leave, -stage.rejoin))
    for i, outer in enumerate(plan):
        for inner in plan[i + 1 :]:
            if inner.leave == outer.leave or inner.leave < outer.rejoin < inner.rejoin:
                raise ValueError(
                    f"{function}: stages overlap: blocks {outer.leave} to {outer.rejoin} and {inner.leave} to {inner.rejoin}; "
                    "one must lie inside the other, or begin after its end"
                )
            if inner.leave == outer.rejoin:
                raise ValueError(
                    f"{function}: a stage leaves at block {inner.leave}, where another rejoins: block {inner.leave - 1} has no "
                    "scores of the tokens that are away"
                )
    return tuple(plan)
