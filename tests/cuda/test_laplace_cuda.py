"""Laplace posteriors on a GPU: the CPU's numbers, the same bits twice, files that go from one to the other, and the command."""

import json

import pytest
import torch
from typer.testing import CliRunner

import effcore.ops.kronecker as ops
from effcore.cli.app import app
from effcore.methods.bayesian_moe import Posterior, laplace
from tests.cli.test_calibrate import folder, questions_file
from tests.methods.laplace_toys import ANSWERS, moe, text

__all__ = ["folder"]

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "deepseek"])
@pytest.mark.parametrize("hessian", ["kron", "diag", "lowrank"])
def test_covariances_equal_the_cpus(kind, hessian):
    """At full rank: a GPU finds low-rank bases by iteration, whose quality tests/cuda/check_kronecker.py measures."""
    loader = [text(seed=s) for s in range(3)]
    found = {}
    for device in (DEVICE, "cpu"):
        model = moe(kind).to(device)
        posterior = laplace(model, loader, answers=ANSWERS, hessian=hessian, rank=16, prior_variance=0.1)
        found[device] = [t.cpu() for t in posterior.logit_distribution(loader[0])]
        assert posterior.predict(loader[0]).device.type == device
    for ours, exact in zip(found[DEVICE], found["cpu"], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def factor(experts, dim, rank):
    vectors = torch.linalg.qr(torch.randn(experts, dim, dim)).Q[:, :, :rank].contiguous()
    return ops.Factor(vectors, torch.rand(experts, rank) * 5, torch.rand(experts))


@pytest.mark.parametrize("ranks", [(10, 10), (96, 10), (10, 72), (96, 72)])
def test_kron_variance_equals_the_cpus_and_itself(ranks):
    torch.manual_seed(0)
    loads, examples = [700, 0, 64, 1, 235], 30
    tokens = sum(loads)
    offsets = torch.tensor([0, *loads]).cumsum(0).int()
    inputs, gradients = torch.randn(tokens, 96), torch.randn(tokens, 4, 72)
    example = torch.randint(0, examples, (tokens,))
    factors = factor(5, 96, ranks[0]), factor(5, 72, ranks[1])
    variances = torch.tensor([0.01, 1.0])

    def on(device):
        moved = [ops.Factor(*(t.to(device) for t in f)) for f in factors]
        rows = (t.to(device) for t in (inputs, gradients, offsets, example))
        return ops.kron_variance(*rows, examples, *moved, variances.to(device)).cpu()

    ours, exact = on(DEVICE), on("cpu")
    assert torch.equal(ours, on(DEVICE))
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())


def test_a_posterior_goes_from_the_gpu_to_the_cpu(tmp_path):
    model, batch = moe("qwen2").to(DEVICE), text()
    posterior = laplace(model, [batch], answers=ANSWERS, rank=3)
    posterior.fit_heldout([text(seed=9)], grid=[1e-3, 1e-1, 1.0])
    posterior.save(tmp_path / "p.safetensors")
    there = posterior.predict(batch).cpu()
    here = Posterior.load(tmp_path / "p.safetensors", model.cpu()).predict(batch)
    torch.testing.assert_close(here, there, rtol=1e-2, atol=1e-3)


def test_an_interrupted_fit_goes_on_with_the_same_bits(tmp_path):
    model, loader = moe("mixtral").to(DEVICE), [text(seed=s) for s in range(4)]
    whole = laplace(model, loader, answers=ANSWERS, rank=3)

    def stops():
        yield from loader[:2]
        raise KeyboardInterrupt

    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        laplace(model, stops(), answers=ANSWERS, rank=3, checkpoint=path, checkpoint_every=1)
    resumed = laplace(model, loader, answers=ANSWERS, rank=3, checkpoint=path)
    assert torch.equal(whole.predict(loader[0]), resumed.predict(loader[0]))


def test_calibrate(folder, tmp_path):
    data = questions_file(tmp_path / "q.jsonl")
    arguments = [
        "calibrate",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--data",
        str(data),
        "--rank",
        "3",
        "--json",
        "-q",
    ]
    output = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    scores = json.loads(output[output.index("{") :])["scores"]
    assert {"MAP", "posterior"} <= set(scores) and all(row["nll"] < 20 for row in scores.values())
    assert (tmp_path / "out" / "posterior.safetensors").exists()
