"""Convolutions over pairs of pixels are those over pixels, in every border."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effcore.nn.faster import faster
from effcore.nn.low_rank import LowRankConv2d
from effcore.nn.side_by_side import NarrowConv2d, block_weight, blocks, convolve_pairs, narrow, pixels
from effcore.nn.stem import StemConv2d, StemNorm


@pytest.mark.parametrize(("count", "width"), [(2, 2), (2, 8), (4, 12)])
def test_blocks_convolve_as_pixels(count, width):
    x = torch.randn(2, 5, 7, width, dtype=torch.float64)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    rows = x.permute(0, 2, 3, 1).contiguous()
    assert blocks(rows, count).data_ptr() == rows.data_ptr(), "nothing is moved"
    got = pixels(F.conv2d(blocks(rows, count), block_weight(weight, count, 3, count - 1), padding=1), count)
    wanted = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(got.permute(0, 3, 1, 2), wanted)
    gradient = torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, gradient) for y in (got.permute(0, 3, 1, 2), wanted)))


@pytest.mark.parametrize("bias", [True, False])
def test_pairs_convolve_as_pixels(bias):
    conv = nn.Conv2d(5, 7, 3, padding=1, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 5, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    got, wanted = convolve_pairs(x, conv.weight, conv.bias), conv(x)
    torch.testing.assert_close(got, wanted)
    assert got.is_contiguous(memory_format=torch.channels_last)
    leaves, gradient = (x, *conv.parameters()), torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, gradient) for y in (got, wanted)))


def test_which_convolutions_are_narrow():
    yes = nn.Conv2d(32, 24, 3, padding=1)
    no = [
        nn.Conv2d(64, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 1),
    ]
    assert type(narrow(yes)) is NarrowConv2d and all(type(narrow(conv)) is nn.Conv2d for conv in no)
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(yes(x), F.conv2d(x, yes.weight, yes.bias, padding=1))


def test_a_faster_model_is_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(32)
            self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
            self.conv2 = LowRankConv2d(32, 48, 3, (16, 24), padding=1)
            self.bn2 = nn.BatchNorm2d(48)

        def forward(self, x):
            return self.bn2(self.conv2(self.maxpool(self.relu(self.bn1(self.conv1(x))))))

    model = Model()
    other = faster(copy.deepcopy(model))
    assert list(other.state_dict()) == list(model.state_dict())
    kinds = [type(m) for m in (other.conv1, other.bn1, other.conv2.core, other.bn2)]
    assert kinds == [StemConv2d, StemNorm, NarrowConv2d, nn.BatchNorm2d]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(x), model(x))
    plain = nn.Sequential(nn.Linear(2, 2))
    assert type(faster(plain)[0]) is nn.Linear
