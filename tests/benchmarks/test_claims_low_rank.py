"""The roofline of a ResNet counts what a compiled block moves: every byte of a small one, by hand. The command's arguments."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.ceilings import Ceilings
from benchmarks.claims import _low_rank_roofline as roofline
from benchmarks.claims import low_rank
from benchmarks.claims._low_rank_worker import in_seams
from effcore.nn.stem import fuse_stem

transformers = pytest.importorskip("transformers")

SIDE, BATCH, NARROW, WIDE = 8, 2, 4, 16


def bytes_of(training: bool) -> dict[str, float]:
    """By layer, of a network with a projecting bottleneck and one without, at a byte a second and endless arithmetic."""
    config = transformers.ResNetConfig(
        embedding_size=NARROW, hidden_sizes=[WIDE], depths=[2], layer_type="bottleneck", num_labels=2
    )
    model = transformers.ResNetForImageClassification(config).train(training)
    x = torch.zeros(BATCH, 3, 4 * SIDE, 4 * SIDE)
    return roofline.layers(model, x, training, Ceilings({"float32": math.inf}, 1.0))


@pytest.mark.parametrize("training", [False, True])
def test_every_byte_of_a_bottleneck(training):
    moved = bytes_of(training)
    narrow, wide = (4.0 * BATCH * SIDE * SIDE * channels for channels in (NARROW, WIDE))
    block = "resnet.encoder.stages.0.layers"
    # A norm by itself: in and out; in training in, in, out and, backward, twice in and gradient, and the gradient out.
    norm = 8 if training else 2
    assert moved[f"{block}.0.layer.0.normalization"] == norm * narrow
    # The last norm, the shortcut's norm and their sum are one: in, shortcut, out. In training the statistics read each once
    # more, and backward they read the block's gradient twice, each input twice, and write each input's gradient.
    together = moved[f"{block}.0.layer.2.normalization"] + moved[f"{block}.0.shortcut.normalization"]
    assert together == (2 + 3 + 2 + 4 + 2 if training else 3) * wide
    # Without a projection: in and shortcut in, out; the shortcut's gradient is no more than the block's.
    assert moved[f"{block}.1.layer.2.normalization"] == (norm + 1) * wide
    # Two gradients meet at a block's input.
    for number, size in ((0, narrow), (1, wide)):
        assert moved.get(f"{block}.{number}", 0.0) == (3 * size if training else 0)
    passes = 3 if training else 1
    assert moved[f"{block}.1.layer.2.convolution"] == passes * (narrow + wide + 4.0 * NARROW * WIDE)


def network() -> tuple[torch.nn.Module, torch.Tensor]:
    """With blocks of both kinds, in both numbers of channels."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck", num_labels=5
    )
    model = transformers.ResNetForImageClassification(config).double()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5), norm.bias.normal_(), norm.running_mean.normal_()
    return model, torch.randn(3, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True])
def test_a_network_in_seams_is_the_network(training):
    torch.manual_seed(0)
    model, x = network()
    wanted, got = [], []
    for logits, to in ((lambda x: model(x).logits, wanted), (in_seams(model, compiled=False), got)):
        model.train(training).zero_grad()
        out = logits(x)
        out.logsumexp(1).sum().backward()
        to += [out.detach(), *(p.grad.clone() for p in model.parameters())]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("training", [False, True])
def test_a_fused_stem_is_charged_as_its_layers(training):
    model, x = network()
    rates = Ceilings({"float64": math.inf}, 1.0)
    apart = roofline.layers(model, x, training, rates)
    together = roofline.layers(fuse_stem(model), x, training, rates)
    name = "resnet.embedder.embedder.convolution"
    parts = {n for n in apart if n.startswith("resnet.embedder")}
    assert parts == {name, "resnet.embedder.embedder.normalization", "resnet.embedder.pooler"}
    assert together.pop(name) == sum(apart.pop(n) for n in parts)
    assert together == apart


@pytest.mark.parametrize("claim, only", [("speed", "timed"), ("progressive", "merging"), ("search", "stem")])
def test_an_unknown_variant_is_refused_by_name(capsys, claim, only):
    """Not measured, silently, with exit code 0."""
    with pytest.raises(SystemExit) as ended:
        low_rank.main([claim, "--only", only, "--json", "/nowhere/x.json"])
    assert ended.value.code == 2 and f"--only names {only}: {claim} has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message", [(["layers", "--device", "cpu"], "layers needs a GPU"), (["table"], "table reads the file")]
)
def test_what_a_claim_needs_is_said(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        low_rank.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
