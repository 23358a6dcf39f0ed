"""Blocks of 2D and 1D parts, and the conversion of models."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effcore
from effcore.methods import conv3d as methods
from effcore.nn import conv3d as blocks
from effcore.ops import conv3d as ops
from effcore.ops import patch_embed
from effcore.reference import conv3d as ref

BLOCKS = {
    "add": lambda *a, **k: blocks.CrossConv3d(*a, **k),
    "cat": lambda *a, **k: blocks.CatConv3d(*a, **k),
    "r2plus1d": lambda *a, **k: blocks.R2Plus1DConv3d(*a, **k),
    "p3d-a": lambda *a, **k: blocks.P3DConv3d(*a, kind="A", **k),
    "p3d-b": lambda *a, **k: blocks.P3DConv3d(*a, kind="B", **k),
    "p3d-c": lambda *a, **k: blocks.P3DConv3d(*a, kind="C", **k),
}
GEOMETRIES = [
    {},
    {"stride": 2},
    {"stride": (1, 2, 2), "kernel_size": (3, 5, 5)},
    {"kernel_size": (5, 3, 1), "stride": (3, 1, 2), "padding": (0, 2, 1)},
    {"padding": 0, "bias": False},
]


@pytest.fixture(autouse=True)
def _told(monkeypatch):
    """That inputs are copied into channels_last_3d is tests/ops's matter."""
    monkeypatch.setattr(ops, "_told", True)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_blocks_have_the_shape_of_conv3d(name, geometry):
    block = BLOCKS[name](6, 9, **geometry)
    x = torch.randn(2, 6, 7, 8, 9)
    dense = nn.Conv3d(6, 9, block.kernel_size, block.stride, block.padding)
    out = block(x)
    assert out.shape == dense(x).shape
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_go_to_channels_last(name):
    block, x = BLOCKS[name](6, 9), torch.randn(2, 6, 3, 8, 9)
    before = block(x)
    block.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last_3d)), before)


def test_parallel_blocks_are_the_branches_that_conv3d_would_be():
    x = torch.randn(2, 6, 7, 8, 9)
    for geometry in GEOMETRIES:
        cat = blocks.CatConv3d(6, 9, **geometry)
        kt, kh, kw = cat.kernel_size
        dense = [
            F.pad(cat.spatial.weight, (0, 0, 0, 0, kt // 2, kt // 2)),
            F.pad(cat.temporal.weight, (kw // 2, kw // 2, kh // 2, kh // 2)),
        ]
        bias = None if cat.spatial.bias is None else torch.cat([cat.spatial.bias, cat.temporal.bias])
        torch.testing.assert_close(cat(x), F.conv3d(x, torch.cat(dense), bias, cat.stride, cat.padding))
        b = blocks.P3DConv3d(6, 9, kind="B", **geometry)
        add = blocks.CrossConv3d(6, 9, **geometry)
        with torch.no_grad():
            add.spatial.copy_(b.spatial.weight)
            add.temporal.copy_(b.temporal.weight)
            if add.bias is not None:
                add.bias.copy_(b.spatial.bias + b.temporal.bias)
        torch.testing.assert_close(add(x), b(x))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_add_is_the_same_by_two_convolutions(geometry):
    block, x = blocks.CrossConv3d(6, 9, **geometry), torch.randn(2, 6, 7, 8, 9)
    torch.testing.assert_close(block._two_convolutions(x), block(x))


def test_weights_as_the_papers_count_them():
    count = lambda block: sum(p.numel() for p in block.parameters())  # noqa: E731
    dense = count(nn.Conv3d(64, 64, 3, bias=False))
    assert count(BLOCKS["add"](64, 64, bias=False)) == 12 * 64**2
    assert count(BLOCKS["cat"](64, 64, bias=False)) == 6 * 64**2
    assert 0.98 * dense < count(BLOCKS["r2plus1d"](64, 64, bias=False)) <= dense
    assert all(count(BLOCKS[f"p3d-{k}"](64, 64, bias=False)) == 12 * 64**2 for k in "abc")


def test_between_stands_between():
    made = blocks.R2Plus1DConv3d(4, 6, between=lambda c: nn.Sequential(nn.BatchNorm3d(c), nn.ReLU()))
    x = torch.randn(1, 4, 3, 5, 5)
    torch.testing.assert_close(made(x), made.temporal(made.between(made.spatial(x))))
    assert isinstance(made.between[0], nn.BatchNorm3d)


@pytest.mark.parametrize("stride", [2, (1, 2, 2)])
def test_the_paper_to_the_letter(stride):
    """Its temporal branch counts pixels in rows of the flattened frame, s² apart."""
    block = blocks.CrossConv3d(3, 5, stride=stride, aligned=False).double()
    x = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64)
    out = block(x)
    frames = x.transpose(1, 2).flatten(0, 1)
    across = F.conv2d(frames, block.spatial[:, :, 0], block.bias, 2, 1).unflatten(0, (2, 4)).transpose(1, 2)
    if stride == 2:
        across = F.conv3d(across, block.thin.weight, block.thin.bias, (2, 1, 1))
    step = block.stride[0]
    lines = F.pad(x.flatten(3)[..., ::4], (0, 0, 1, 1))
    along = torch.stack(
        [
            torch.einsum("bclp,ocl->bop", lines[:, :, t : t + 3], block.temporal[..., 0, 0])
            for t in range(0, lines.shape[2] - 2, step)
        ],
        2,
    ).unflatten(3, (3, 4))
    torch.testing.assert_close(out, across + along)
    with pytest.raises(ValueError, match="height and width divisible by 2, got 5x8"):
        block(x[:, :, :, :5])


@pytest.mark.parametrize("size", [(4, 8, 6), (5, 9, 7)])
def test_patches_are_one_product(size):
    dense = nn.Conv3d(3, 10, (2, 4, 3), (2, 4, 3))
    made = blocks.PatchEmbed3d(3, 10, (2, 4, 3))
    made.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(made(x), dense(x))
    with pytest.raises(ValueError, match="holds no patch"):
        made(x[:, :, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 19, 20])
def test_patches_are_the_same_however_they_are_gathered(dtype, width):
    """By words, by elements (a width of 19, no contiguous lines, gradients), and as torch's convolution."""
    made = blocks.PatchEmbed3d(3, 10, (2, 2, 4)).to(dtype)
    x = torch.randn(2, 3, 4, 6, width).to(dtype)
    assert patch_embed._moves_words(x, 4) == (width % 4 == 0)
    out = made(x)
    assert torch.equal(out, made(x.transpose(0, 1).contiguous().transpose(0, 1)))
    assert torch.equal(out, made(x.clone().requires_grad_()))
    exact = F.conv3d(x.double(), made.weight.double(), made.bias.double(), (2, 2, 4))
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)
    gradient = torch.autograd.grad(out.sum(), made.weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(made(x.clone().requires_grad_()).sum(), made.weight)[0])


def test_bad_arguments_are_named():
    cases = {
        "kernel_size must be odd": lambda: blocks.CrossConv3d(3, 4, kernel_size=2),
        "stride must be an int or 3": lambda: blocks.CatConv3d(3, 4, stride=(1, 2)),
        "padding must be 'same'": lambda: blocks.CrossConv3d(3, 4, padding="valid"),
        "out_channels must be at least 2": lambda: blocks.CatConv3d(3, 1),
        "must be channels, got 0 in and 4 out": lambda: blocks.CrossConv3d(0, 4),
        "weight has 3 input channels but x has 2": lambda: blocks.PatchEmbed3d(3, 4, 2)(torch.randn(1, 2, 4, 8, 8)),
        "kind must be 'A', 'B' or 'C', got 'D'": lambda: blocks.P3DConv3d(3, 4, kind="D"),
        "aligned=False takes stride": lambda: blocks.CrossConv3d(3, 4, stride=(2, 1, 1), aligned=False),
        "combine must be one of": lambda: effcore.factorize_conv3d(nn.Conv3d(1, 1, 3), "mul"),
        "init must be one of": lambda: effcore.factorize_conv3d(nn.Conv3d(1, 1, 3), init="zero"),
        "on the meta device; load them first": lambda: effcore.factorize_conv3d(nn.Conv3d(1, 1, 3, device="meta")),
        "has no nn.Conv3d": lambda: effcore.factorize_conv3d(nn.Linear(1, 1)),
        "has not converted": lambda: methods.report(nn.Linear(1, 1)),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- conversion


class Network(nn.Module):
    """Everything that video networks do with Conv3d."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4))
        self.block = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU())
        self.down = nn.Conv3d(8, 12, 3, stride=2, padding="valid")
        self.grouped = nn.Conv3d(12, 12, 3, padding=1, groups=3)
        self.point = nn.Conv3d(12, 12, 1)
        self.dilated = nn.Conv3d(12, 12, 3, padding=2, dilation=2)
        self.shared = self.block[0]

    def forward(self, x):
        x = self.embed(x)
        x = self.shared(self.block(x))
        return self.dilated(self.point(self.grouped(self.down(x))))


@pytest.mark.parametrize("combine", methods.COMBINE)
def test_conversion(combine):
    model = Network().eval()
    x = torch.randn(1, 3, 8, 28, 24)
    before = model(x)
    copied = effcore.factorize_conv3d(model, combine, inplace=False)
    assert torch.equal(model(x), before) and type(model.down) is nn.Conv3d
    converted = effcore.factorize_conv3d(model, combine)
    assert converted is model and model(x).shape == before.shape
    torch.testing.assert_close(copied(x), model(x))
    became = {r.name: (r.became, r.reason) for r in methods.report(model)}
    assert became["embed"] == ("product", "") and became["block.0"][0] == became["down"][0] == combine
    assert model.shared is model.block[0]  # still one layer
    assert became["grouped"] == ("kept", "3 groups") and "dilation" in became["dilated"][1]
    assert became["point"][1] == "kernel (1, 1, 1) has one part"
    assert not model.block[0].training and combine in methods.describe(model)
    counted = {r.name: r.parameters[1] for r in methods.report(model)}
    assert counted["down"] == sum(p.numel() for p in model.down.parameters())


def test_patches_keep_their_parameters():
    model = nn.Sequential(nn.Conv3d(3, 8, 4, 4))
    weight, x = model[0].weight, torch.randn(1, 3, 8, 8, 8)
    before, keys = model(x), list(model.state_dict())
    effcore.factorize_conv3d(model)
    assert model[0].weight is weight and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("combine", methods.COMBINE)
def test_a_kernel_that_has_the_form_already_is_kept_exactly(combine):
    made = {"add": blocks.CrossConv3d, "cat": blocks.CatConv3d, "r2plus1d": blocks.R2Plus1DConv3d}[combine](5, 8)
    dense = nn.Conv3d(5, 8, 3, padding=1).double()
    with torch.no_grad():
        dense.bias.zero_()
        made.double()
        impulse = torch.zeros(5, 5, 5, 5, 5, dtype=torch.float64)  # one voxel of each channel
        for c in range(5):
            impulse[c, c, 2, 2, 2] = 1
        for p in (p for n, p in made.named_parameters() if "bias" in n):
            p.zero_()
        dense.weight.copy_(made(impulse)[:, :, 1:4, 1:4, 1:4].flip(2, 3, 4).transpose(0, 1))
    x = torch.randn(2, 5, 4, 6, 6, dtype=torch.float64)
    before = dense(x)
    model = effcore.factorize_conv3d(nn.Sequential(dense), combine)
    torch.testing.assert_close(model(x), before)
    assert methods.report(model)[0].error < 1e-12


def test_the_fit_is_the_best_cross():
    """Its error is what lies off the cross, and no gradient points elsewhere."""
    kernel = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64)
    spatial, temporal = (t.requires_grad_() for t in methods.nearest_cross(kernel))
    loss = (ref.dense_kernel(spatial, temporal) - kernel).square().sum()
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, (spatial, temporal)))
    on = ref.dense_kernel(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3)) > 0
    torch.testing.assert_close(loss, kernel.square().masked_fill(on, 0).sum())
    model = nn.Sequential(nn.Conv3d(3, 4, 3).double())
    with torch.no_grad():
        model[0].weight.copy_(kernel)
    error = methods.report(effcore.factorize_conv3d(model))[0].error
    assert error == pytest.approx(math.sqrt(loss.item()) / kernel.norm().item())


def test_random_weights_and_frozen_layers():
    model = Network().half()
    for p in model.parameters():
        p.requires_grad_(False)
    effcore.factorize_conv3d(model, init="random")
    report = {r.name: r for r in methods.report(model)}
    assert math.isnan(report["down"].error) and report["embed"].error == 0
    assert all(p.dtype == torch.float16 and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kernel", [3, 2], ids=["cross", "product"])
def test_a_bias_that_trains_alone_still_does(kernel):
    layer = nn.Conv3d(4, 4, kernel, stride=1 if kernel == 3 else 2)
    layer.weight.requires_grad_(False)
    (made,) = effcore.factorize_conv3d(nn.Sequential(layer))
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["bias"]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Conv3d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.Conv3d(4, 4, 3))
    model[1].weight = model[0].weight
    effcore.factorize_conv3d(model)
    assert model[0].weight is model[1].weight
    assert [r.reason for r in methods.report(model)] == ["shares its weight with 1", "shares its weight with 0", ""]


def test_a_layer_that_would_get_slower_is_kept(monkeypatch):
    times = iter([(2.0, 1.0), (1.0, 2.0), (1.0, 0.5)])
    monkeypatch.setattr(methods, "_milliseconds", lambda *_: next(times))
    model = Network().train()
    statistics = model.block[1].running_mean.clone()
    effcore.factorize_conv3d(model, sample=torch.randn(1, 3, 8, 28, 24))
    report = {r.name: r for r in methods.report(model)}
    assert report["embed"].milliseconds == (2.0, 1.0) and report["embed"].became == "product"
    assert report["block.0"].reason == "add would be slower" and type(model.block[0]) is nn.Conv3d
    assert report["down"].became == "add"
    assert torch.equal(model.block[1].running_mean, statistics) and model.training


def test_layers_are_timed_on_what_reaches_them():
    model = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.MaxPool3d(2), nn.Conv3d(8, 16, 3, padding=1)).eval()
    x = torch.randn(1, 8, 4, 12, 12)
    effcore.factorize_conv3d(model, sample=(x,))
    assert all(r.milliseconds is not None and min(r.milliseconds) > 0 for r in methods.report(model))
    assert model(x).shape == (1, 16, 2, 6, 6)
