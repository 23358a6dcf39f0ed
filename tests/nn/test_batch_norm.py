"""Batch norms whose statistics one kernel sums up: the same modules elsewhere (the kernel: tests/cuda/check_stem.py)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from effcore.nn.batch_norm import BatchNorm2d, batch_statistics, faster_norms, follow


def test_a_model_with_faster_norms_is_the_model():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8))
    )
    faster = faster_norms(copy.deepcopy(model))
    assert [type(m) for m in (faster[1], faster[2][0], faster[2][1])] == [BatchNorm2d, BatchNorm2d, nn.GroupNorm]
    assert list(faster.state_dict()) == list(model.state_dict())
    for training in (True, False):
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(faster.train(training)(x), model.train(training)(x))
        torch.testing.assert_close(dict(faster.named_buffers()), dict(model.named_buffers()))


def test_running_statistics_follow():
    for momentum in (0.1, None):
        norm, other = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
        for _ in range(3):
            x = torch.randn(5, 4, 3, 3) * 2 + 1
            norm(x)
            rows = x.movedim(1, -1).flatten(0, 2)
            follow(other, rows.mean(0), rows.var(0, unbiased=False), len(rows))
        torch.testing.assert_close(dict(other.named_buffers()), dict(norm.named_buffers()))


def test_the_gradient_of_statistics():
    """The formula alone; the kernel needs a GPU."""
    from effcore.nn.batch_norm import _gradient

    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    dmean, dvariance = torch.randn(2, 6, dtype=torch.float64).unbind(0)
    (wanted,) = torch.autograd.grad([mean, variance], x, [dmean, dvariance])

    class Context:
        saved_tensors = (x.detach(), mean.detach())

    torch.testing.assert_close(_gradient(Context, dmean, dvariance), wanted)
    assert batch_statistics._opoverload.name() == "effcore::batch_statistics"
