"""The fused stem, as a module of a network, on any device (its kernels: tests/cuda/check_stem.py)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from effcore.nn.stem import StemConv2d, convolve, fuse_stem, stem
from effcore.reference import norm_relu_pool as ref

transformers = pytest.importorskip("transformers")


def network() -> nn.Module:
    config = transformers.ResNetConfig(depths=[1], embedding_size=16, hidden_sizes=[32], num_labels=4)
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model


class Torchvision(nn.Module):
    """The names of its ResNet, and in its order."""

    def __init__(self, **changes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        for name, module in changes.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """With all gradients and buffers."""
    out = model(x)
    out = getattr(out, "logits", out)
    model.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [network, Torchvision])
def test_a_model_with_a_fused_stem_is_the_model(make, training):
    torch.manual_seed(0)
    model = make().train(training)
    fused = fuse_stem(copy.deepcopy(model))
    assert any(isinstance(m, StemConv2d) for m in fused.modules())
    assert list(fused.state_dict()) == list(model.state_dict())
    for side in (64, 63):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(outputs(fused, x), outputs(model, x))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        conv = next(m for m in other.modules() if isinstance(m, StemConv2d))
        assert any(m is conv.norm for m in other.modules()), "the norm that it uses is the copy's"
        assert len(list(other.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", [(32, 48), (30, 18), (2, 16), (33, 27), (1, 1)])
def test_a_fused_stem_is_its_convolution_and_the_reference(side, training):
    torch.manual_seed(1)
    model = Torchvision().double().train(training)
    for tensor in (model.bn1.weight, model.bn1.bias, model.bn1.running_mean):
        nn.init.normal_(tensor)
    images, norm = torch.randn(2, 3, *side, dtype=torch.float64), model.bn1
    leaves = [model.conv1.weight, norm.weight, norm.bias]
    blocks = side[0] % 2 == 0 and side[1] % 8 == 0
    y = convolve(images, leaves[0]) if blocks else model.conv1(images).permute(0, 2, 3, 1)
    old = norm.running_mean.clone(), norm.running_var.clone()
    wanted = ref.norm_relu_pool(y, *leaves[1:], *old, norm.eps, training)
    got = fuse_stem(model)(images).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, wanted)
    gradient = torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad(z, leaves, gradient) for z in (got, wanted)))
    if training:
        mean, variance = ref.statistics(y.detach().flatten(0, 2))
        count = y.numel() // y.shape[-1]
        variance = variance * count / (count - 1)
        torch.testing.assert_close(norm.running_mean, old[0].lerp(mean, 0.1))
        torch.testing.assert_close(norm.running_var, old[1].lerp(variance, 0.1))


@pytest.mark.parametrize("features", [1, 3, 4])
def test_blocks_convolve_as_pixels(features):
    x, weight = (
        torch.randn(2, features, 12, 16, dtype=torch.float64),
        torch.randn(8, features, 7, 7, dtype=torch.float64),
    )
    got = convolve(x, weight.requires_grad_())
    wanted = nn.functional.conv2d(x, weight, stride=2, padding=3).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, wanted)
    assert got.shape == (2, 6, 8, 8)
    gradient = torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, gradient) for y in (got, wanted)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1": nn.Conv2d(3, 16, 3, padding=1, bias=False)}, "convolution must be 7x7"),
        ({"conv1": nn.Conv2d(3, 16, 7, stride=2, padding=3)}, "without a bias"),
        ({"conv1": nn.Conv2d(3, 128, 7, stride=2, padding=3, bias=False)}, "at most 64, got 128"),
        ({"bn1": nn.GroupNorm(4, 16)}, "norm must be a BatchNorm2d"),
        ({"relu": nn.GELU()}, "activation must be ReLU"),
        ({"maxpool": nn.MaxPool2d(2, 2)}, "pool must be a maximum of 3x3"),
        ({"maxpool": None}, "no stem"),
    ],
)
def test_another_stem_is_refused(changes, message):
    model = Torchvision(**changes)
    with pytest.raises(ValueError, match=message):
        fuse_stem(model)
    assert not any(isinstance(m, StemConv2d) for m in model.modules())


def test_a_norm_that_is_put_there_later_is_refused():
    fused = fuse_stem(Torchvision())
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(fused.bn1, nn.BatchNorm2d)
    assert fused.to("meta")(x.to("meta")).shape == (2, 16, 8, 8)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fuse_stem(Torchvision()))
    with pytest.raises(RuntimeError, match="bn1 is SyncBatchNorm now"):
        fused(x)


def test_what_the_kernels_do_not_serve_is_refused():
    with pytest.raises(ValueError, match="images must be bfloat16 or float16 on a GPU"):
        stem(torch.randn(2, 3, 32, 32), torch.randn(16, 3, 7, 7), nn.BatchNorm2d(16))
