"""Moving digits: the same clips for a seed, motion as the label says, no class in a single frame's place."""

import pytest
import torch

pytest.importorskip("sklearn")

from effcore.data.moving_digits import DIRECTIONS, MovingDigits


def test_clips_move_as_they_say():
    data = MovingDigits("test", size=20, frames=5, noise=0.0)
    clips, digits, directions = data.sample(40, torch.Generator().manual_seed(1))
    assert clips.shape == (40, 1, 5, 20, 20) and digits.max() < 10
    for clip, direction in zip(clips[:, 0], directions, strict=True):
        dy, dx = DIRECTIONS[direction]
        moved = [torch.roll(clip[:-1], (speed * dy, speed * dx), (1, 2)) for speed in (1, 2)]
        assert any(torch.equal(m, clip[1:]) for m in moved)


def test_a_seed_gives_the_same_clips_and_splits_differ():
    first, again = (MovingDigits("train").sample(4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(MovingDigits("train").images) == 1437 and len(MovingDigits("test").images) == 360


@pytest.mark.parametrize("bad", [{"split": "all"}, {"size": 8}, {"frames": 1}, {"noise": -1.0}])
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=f"MovingDigits: {next(iter(bad))} must"):
        MovingDigits(**bad)
