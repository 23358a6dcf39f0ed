"""Interrupted fits, and what the Laplace posterior refuses."""

import contextlib
import resource

import pytest
import torch

from effcore.errors import InputError
from effcore.methods.bayesian_moe import laplace
from tests.methods.laplace_toys import ANSWERS, data, moe, text, toy

# ---------------------------------------------------------------- interruption


def interrupted(loader, after):
    for number, batch in enumerate(loader):
        if number == after:
            raise KeyboardInterrupt
        yield batch


def test_an_interrupted_fit_goes_on(tmp_path):
    model, loader = moe("mixtral"), [text(seed=s) for s in range(7)]
    arguments = {"rank": 3, "answers": ANSWERS, "prior_mean": "zero", "fisher": "sampled"}
    whole = laplace(model, loader, **arguments)
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        laplace(model, interrupted(loader, 5), **arguments, checkpoint=path, checkpoint_every=2)
    done = []
    resumed = laplace(
        model,
        loader,
        **arguments,
        checkpoint=path,
        checkpoint_every=2,
        progress=lambda n, total: done.append((n, total)),
    )
    assert done == [(5, 7), (6, 7), (7, 7)] and not path.exists()
    assert torch.equal(whole.predict(loader[0]), resumed.predict(loader[0]))
    assert torch.equal(whole.log_evidence(), resumed.log_evidence())


def test_a_kept_checkpoint_is_the_whole_fit(tmp_path):
    model, loader, path = moe("mixtral"), [text(seed=s) for s in range(3)], tmp_path / "fit.safetensors"
    arguments = {"rank": 3, "answers": ANSWERS, "checkpoint": path, "keep_checkpoint": True}
    whole, done = laplace(model, loader, **arguments), []
    again = laplace(model, loader, **arguments, progress=lambda *at: done.append(at))
    assert done == [] and path.exists()
    assert torch.equal(whole.predict(loader[0]), again.predict(loader[0]))


def test_a_loader_that_shuffles_between_passes_is_refused(tmp_path):
    model, loader = moe("mixtral"), [text(seed=s) for s in range(6)]
    path = tmp_path / "fit.safetensors"
    arguments = {"rank": 3, "answers": ANSWERS, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        laplace(model, interrupted(loader, 4), **arguments)
    kept = path.read_bytes()
    with pytest.raises(InputError, match="other batches than those of the interrupted fit; does it shuffle"):
        laplace(model, loader[::-1], **arguments)
    with pytest.raises(InputError, match="had seen 4 batches, but the loader has 2"):
        laplace(model, loader[:2], **arguments)
    with pytest.raises(InputError, match="other settings"):
        laplace(model, loader, **(arguments | {"rank": 4}))
    assert path.read_bytes() == kept


# ---------------------------------------------------------------- refusals


def test_experts_that_no_token_reached_are_reported_and_keep_the_prior():
    model = moe("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[4] = 0
            layer.mlp.gate.weight[:4].normal_(0, 50)
    posterior = laplace(model, [text(rows=2, length=5)], hessian="kron", answers=ANSWERS, prior_variance=0.5)
    assert posterior.unrouted
    layer = posterior.layers[0]
    (name, experts), *_ = posterior.unrouted.items()
    layer = next(l for l in posterior.layers if l.tap.name == name)
    draws = torch.stack(
        [layer.sample(torch.tensor(0.5), torch.Generator().manual_seed(s))[experts[0]] for s in range(300)]
    )
    assert draws.var(0).mean() == pytest.approx(0.5, rel=0.05)


def test_nan_gradients_leave_nothing_behind(tmp_path):
    model, loader = moe("mixtral"), [text(seed=s) for s in range(4)]
    path = tmp_path / "fit.safetensors"

    def broken():
        for number, batch in enumerate(loader):
            if number == 3:
                with torch.no_grad():
                    model.model.layers[0].mlp.experts.down_proj[:, 0, 0] = float("nan")
            yield batch

    with pytest.raises(InputError, match=r"NaN or infinite gradients at model\.layers\.0.* in batch 3"):
        laplace(model, broken(), rank=3, answers=ANSWERS, checkpoint=path, checkpoint_every=1)
    from safetensors.torch import load_file

    assert all(torch.isfinite(t.double()).all() for t in load_file(path).values())
    assert all(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())


@contextlib.contextmanager
def full_disk(room):
    """Files end after ``room`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(tmp_path):
    model, loader = moe("mixtral"), [text(seed=s) for s in range(4)]
    arguments = {"rank": 3, "answers": ANSWERS}
    whole = laplace(model, loader, **arguments)
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        laplace(model, interrupted(loader, 2), **arguments, checkpoint=path, checkpoint_every=1)
    kept = path.read_bytes()
    with full_disk(len(kept) // 2), pytest.raises(OSError, match=r"fit\.safetensors: cannot be written"):
        laplace(model, loader, **arguments, checkpoint=path, checkpoint_every=1)
    assert path.read_bytes() == kept
    whole.save(tmp_path / "posterior.safetensors")
    saved = (tmp_path / "posterior.safetensors").read_bytes()
    with full_disk(len(saved) // 2), pytest.raises(OSError, match="cannot be written"):
        whole.save(tmp_path / "posterior.safetensors")
    assert (tmp_path / "posterior.safetensors").read_bytes() == saved
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.safetensors", "posterior.safetensors"]
    resumed = laplace(model, loader, **arguments, checkpoint=path)
    assert torch.equal(whole.predict(loader[0]), resumed.predict(loader[0]))


class Columns(torch.nn.Module):
    """Gives as many classes as its input has columns."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.scale(x[..., None])[..., 0]


def test_another_number_of_classes_is_refused():
    wide, narrow = torch.randn(3, 4), torch.randn(3, 2)
    with pytest.raises(InputError, match="batch 1 has 2 classes, the ones before had 4"):
        laplace(Columns(), [(wide,), (narrow,)], targets="last", hessian="kron")
    posterior = laplace(Columns(), [(wide,)], targets="last", hessian="kron")
    with pytest.raises(InputError, match="the model gives 2 classes, the posterior was fitted to 4"):
        posterior.predict((narrow,))


X, Y = data()
REFUSED = {
    "empty loader": (lambda: laplace(toy(), [], targets="last", rank=2), "the loader is empty"),
    "no experts": (lambda: laplace(toy(), [(X, Y)]), "Sequential has no experts"),
    "no adapters": (lambda: laplace(toy(), [(X, Y)], targets="lora"), "has no LoRA adapters"),
    "targets": (lambda: laplace(toy(), [(X, Y)], targets="expert"), "targets must be.*did you mean 'experts'"),
    "module": (lambda: laplace(toy(), [(X, Y)], targets=["7"]), "'7', no module of the model"),
    "not linear": (lambda: laplace(toy(), [(X, Y)], targets=["1"]), "1 is a Tanh, neither linear nor experts"),
    "rank": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=6), r"rank 6 is above both dimensions of 2 \(4 x 5\)"),
    "rank 0": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=0), "rank must be at least 1"),
    "hessian": (lambda: laplace(toy(), [(X, Y)], targets="last", hessian="full"), "hessian must be one of lowrank, kron, diag"),
    "fisher": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2, fisher="empirical"), "fisher must be"),
    "prior": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2, prior_variance=0.0), "prior_variance must be positive"),
    "labels": (lambda: laplace(toy(), [(X, Y + 3)], targets="last", rank=2), "labels of batch 0 go from 3 to 6.*4 classes"),
    "labels float": (lambda: laplace(toy(), [(X, Y.double())], targets="last", rank=2), "labels of batch 0 must be integers"),
    "labels shape": (lambda: laplace(toy(), [(X, Y[:3])], targets="last", rank=2), r"batch 0 must be integers \[24\]"),
    "no answers": (lambda: laplace(moe("mixtral"), [text()], rank=2), "answers= must name the token ids"),
    "answers": (lambda: laplace(moe("mixtral"), [text()], rank=2, answers=[3, 3]), "at least two different token ids"),
    "answers range": (lambda: laplace(moe("mixtral"), [text()], rank=2, answers=[3, 99]), "token 99 of a vocabulary of 40"),
    "prior mean": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2, prior_mean={}), "prior_mean must have 2.weight"),
    "evidence at the MAP": (
        lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).log_evidence(), "prior mean other than the MAP"),
    "evidence without labels": (
        lambda: laplace(toy(), [(X,)], targets="last", rank=2, prior_mean="zero").log_evidence(), "needs the labels"),
    "heldout without labels": (
        lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).fit_heldout([(X,)]), "batch 0 has no labels"),
    "heldout empty": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).fit_heldout([]), "held-out loader is empty"),
    "method": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).predict((X,), method="map"), "method must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_named(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()
