"""Decomposition: exact at full rank, as good as it says, and refusing by name what it cannot do."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import effcore
from effcore.methods import low_rank
from effcore.methods.low_rank_factor import KernelFactors, MatrixFactors, relative_error, svd_rank, tucker_ranks
from effcore.methods.low_rank_layers import Layer
from effcore.methods.low_rank_ranks import by_size
from effcore.nn.low_rank import LowRankConv2d, LowRankLinear

LAYERS = {
    "wide": (lambda: nn.Linear(24, 40), (3, 24)),
    "tall": (lambda: nn.Linear(40, 24, bias=False), (2, 3, 40)),
    "conv1d": (lambda: _conv1d(24, 40), (3, 24)),
    "pointwise": (lambda: nn.Conv2d(20, 36, 1, stride=2), (2, 20, 7, 7)),
    "conv": (lambda: nn.Conv2d(20, 18, 3, stride=2, padding=1), (2, 20, 9, 9)),
    "dilated": (lambda: nn.Conv2d(16, 24, (3, 5), padding="same", dilation=2, bias=False), (2, 16, 9, 9)),
}  # fmt: skip


def _conv1d(features, out):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, features)


def hugging_face(kind):
    import transformers as t

    if kind == "resnet":
        config = t.ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64], depths=[2, 1], layer_type="bottleneck", num_labels=4
        )
        return t.ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = t.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
        return t.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "gpt2":
        config = t.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
        return t.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 9))}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = t.LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=2, tie_word_embeddings=True)
    return t.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 9))}


MODELS = ("resnet", "vit", "gpt2", "llama")


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_the_dense_layer(name):
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make()), torch.randn(shape)
    weight = model[0].weight
    full = tuple(weight.shape[1::-1]) if name in ("conv", "dilated") else min(weight.shape[:2])
    for data in (None, [x]):
        new = effcore.decompose(model, ranks={"0": full}, data=data, measure=None, inplace=False)
        torch.testing.assert_close(new(x), model(x), rtol=2e-5, atol=2e-5)
        assert low_rank.report(new).layers[0].error < 1e-6
    assert type(model[0]) is not type(new[0]), "inplace=False leaves the model alone"


@pytest.mark.parametrize("name", LAYERS)
def test_reported_error_is_the_error_measured(name):
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make()), torch.randn(shape)
    dense = model[0].weight.detach().T if name == "conv1d" else model[0].weight.detach()
    rank = (7, 6) if name in ("conv", "dilated") else 9
    for data in (None, [x]):
        new = effcore.decompose(model, ranks={"0": rank}, data=data, measure=None, inplace=False)
        row = low_rank.report(new).layers[0]
        measured = (new[0].weight - dense).norm() / dense.norm()
        assert row.error == pytest.approx(measured.item(), rel=1e-5) and 0.1 < row.error < 1
        assert row.parameters_after == sum(p.numel() for n, p in new.named_parameters() if "bias" not in n)


def test_truncation_is_optimal():
    w = torch.randn(30, 50, dtype=torch.float64)
    s = torch.linalg.svdvals(w)
    for matrix in (w, w.T):
        factors = MatrixFactors.of(matrix)
        down, up = factors.split(8)
        assert relative_error(matrix, up @ down) == pytest.approx((s[8:].norm() / s.norm()).item(), rel=1e-9)
        assert factors.error(8) == pytest.approx((s[8:].norm() / s.norm()).item(), rel=1e-9)
        assert torch.allclose(down.norm(dim=1), up.norm(dim=0)), "singular values are shared out evenly"
        error = factors.error(8)
        assert factors.rank_for(error * 1.0001) == 8 and factors.rank_for(error * 0.9999) == 9


def test_weights_by_activations_win_on_outputs():
    x = torch.randn(500, 40, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, 40, dtype=torch.float64))
    x = x @ torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    for w in (torch.randn(60, 40, dtype=torch.float64), torch.randn(20, 40, dtype=torch.float64)):
        errors = []
        for moments in (None, x.T @ x / len(x)):
            down, up = MatrixFactors.of(w, moments).split(10)
            errors.append(((x @ w.T - x @ down.T @ up.T).norm() / (x @ w.T).norm()).item())
        assert errors[1] < 0.3 * errors[0]
        best = torch.linalg.svdvals(x @ w.T)
        assert errors[1] == pytest.approx((best[10:].norm() / best.norm()).item(), rel=1e-2)


def test_iteration_improves_on_truncation():
    w = torch.randn(24, 20, 3, 3)
    errors = []
    for iterations in (1, 20):
        first, core, last = KernelFactors.of(w).split((9, 8), iterations)
        errors.append(relative_error(w, torch.einsum("op,pqhw,qi->oihw", last, core, first)))
        assert torch.allclose(first @ first.T, torch.eye(9, dtype=torch.float64)), "outer factors are orthonormal"
    assert errors[1] < errors[0]


def test_rank_formulas():
    assert [tucker_ranks(c, c, 9, 2.0)[0] for c in (64, 128, 256, 512)] == [38, 77, 154, 309]  # of 2407.20266
    assert svd_rank(2048, 512, 2.0) == 204
    c, s, ratio = 96, 160, 3.0
    r1, r2 = tucker_ranks(c, s, 9, ratio)
    assert (c * r1 + 9 * r1 * r2 + r2 * s) / (9 * c * s) == pytest.approx(1 / ratio, rel=0.03)


@pytest.mark.parametrize("kind", MODELS)
def test_on_models(kind):
    model, batch = hugging_face(kind)
    model.eval()
    exclude = ["lm_head"] if kind == "gpt2" else []
    small = effcore.decompose(model, ratio=1.6, exclude=exclude, multiple=1, inplace=False)
    replaced = [m for m in small.modules() if isinstance(m, LowRankLinear | LowRankConv2d)]
    rows = [r for r in low_rank.report(small).layers if r.rank is not None]
    assert len(replaced) == len(rows) >= 4
    for row in rows:
        assert 1.6 <= row.parameters_before / row.parameters_after < 3.3
    out, dense = small(**batch).logits, model(**batch).logits
    assert out.shape == dense.shape and torch.isfinite(out).all() and not torch.equal(out, dense)
    small.train()
    small(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for m in replaced for p in m.parameters())


def test_error_target_holds_and_dense_stays_where_it_must():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 8) @ torch.randn(8, 64) + 0.01 * torch.randn(64, 64))
    new = effcore.decompose(model, error=0.05, multiple=1)
    rows = {r.name: r for r in low_rank.report(new).layers}
    assert rows["0"].rank == 8 and rows["0"].error <= 0.05
    assert rows["1"].rank is None and "smaller" in rows["1"].note, "a random matrix has no low rank"


def test_time_target_and_timed_ratio():
    model = nn.Sequential(
        nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16)
    ).eval()
    x = torch.randn(512, 1024)
    new = effcore.decompose(model, time=0.7, data=[x], inplace=False)
    before, after = low_rank.report(new).total_ms()
    assert after <= 0.7 * before
    new = effcore.decompose(model, ratio=4.0, data=[x], inplace=False)
    for row in low_rank.report(new).layers:
        assert row.ms_after <= row.ms_before
    with pytest.raises(ValueError, match=r"time 1e-06 cannot be reached: the fastest ranks take"):
        effcore.decompose(model, time=1e-6, data=[x], inplace=False)


def test_it_leaves_modes_and_random_numbers_as_they_were():
    """A norm that was frozen on purpose stays so; how many layers were timed does not change what is drawn afterwards."""
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 32)).train()
    model[1].eval()
    state = torch.get_rng_state()
    effcore.decompose(model, ratio=2.0, data=[torch.ones(8, 32)])
    assert model.training and not model[1].training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", [nn.Linear(32, 32), nn.Conv2d(32, 32, 3)], ids=["linear", "conv"])
def test_a_bias_that_trains_alone_still_does(layer):
    layer.weight.requires_grad_(False)
    model = effcore.decompose(nn.Sequential(layer), ratio=2.0)
    assert [p is model[0].bias for p in model.parameters() if p.requires_grad] == [True]


class Stopwatch:
    """Times as they are given: of the dense layer, and of a rank."""

    seen = None

    def __init__(self, dense, at):
        self.dense, self.at = (lambda layer: dense), (lambda layer, rank: at(rank))


def test_a_layer_stays_dense_unless_its_factors_are_faster_by_more_than_timings_scatter():
    layer = Layer("", nn.Linear(512, 512), "linear")
    wanted = layer.rank_at(2.0)
    for dense, rank in ((wanted * 1.0, None), (wanted * 1.02, None), (wanted * 1.05, wanted)):
        assert by_size(layer, wanted, 16, Stopwatch(dense, float)).rank == rank
    # A step in time is stepped under.
    assert by_size(layer, wanted, 16, Stopwatch(9.0, lambda rank: 8.0 if rank > 112 else 4.0)).rank == 112


def test_tied_weights_stay_tied():
    model, _ = hugging_face("llama")
    for include in (None, ["lm_head"]):
        if include:
            with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
                effcore.decompose(model, ratio=2.0, include=include)
        else:
            effcore.decompose(model, ratio=2.0, multiple=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "shares its weight" in {r.name: r for r in low_rank.report(model).layers}["lm_head"].note
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        effcore.decompose(hugging_face("llama")[0], ranks={"lm_head": 4})


def nan_model():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight.data[3, 4] = math.nan
    return model


def sparse_model():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse(), requires_grad=False)
    return model


def quantised_model():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    return model


def plain():
    return nn.Sequential(nn.Linear(32, 48), nn.Conv2d(16, 24, 3))


BAD = {
    "no target": (lambda: effcore.decompose(plain()), "give one of ratio, error, time and ranks, got none"),
    "two targets": (lambda: effcore.decompose(plain(), 2.0, error=0.1), "got ratio, error"),
    "ratio": (lambda: effcore.decompose(plain(), ratio=1.0), "ratio must be above 1, got 1.0"),
    "ratio nan": (lambda: effcore.decompose(plain(), ratio=math.nan), "ratio must be a finite number"),
    "error": (lambda: effcore.decompose(plain(), error=1.5), "error must be between 0 and 1, got 1.5"),
    "time": (lambda: effcore.decompose(plain(), time=0.5), "time needs data"),
    "rank 0": (lambda: effcore.decompose(plain(), ranks={"0": 0}), "rank of 0 must be from 1 to 32, got 0"),
    "rank limit": (lambda: effcore.decompose(plain(), ranks={"0": 33}), "rank of 0 must be from 1 to 32, got 33"),
    "rank pair": (lambda: effcore.decompose(plain(), ranks={"1": 4}), r"rank of 1 must be a pair of integers"),
    "rank pair limit": (lambda: effcore.decompose(plain(), ranks={"1": (4, 25)}), r"1 to 16 and 1 to 24, got \(4, 25\)"),
    "unknown": (lambda: effcore.decompose(plain(), ranks={"00": 4}), "ranks names '00', which the model does not have"),
    "include": (lambda: effcore.decompose(plain(), 2.0, include=["nope"]), "include 'nope' matches no"),
    "no layers": (lambda: effcore.decompose(nn.ReLU(), 2.0), "ReLU has no dense linear or convolution layer"),
    "multiple": (lambda: effcore.decompose(plain(), 2.0, multiple=0), "multiple must be positive"),
    "measure": (lambda: effcore.decompose(plain(), 2.0, measure="both"), "measure must be"),
    "no batch": (lambda: effcore.decompose(plain(), 2.0, data=[]), "data gave no batch"),
    "nan": (lambda: effcore.decompose(nan_model(), 2.0), "0.weight holds NaN or infinities"),
    "sparse": (lambda: effcore.decompose(sparse_model(), 2.0), "0 has sparse weights"),
    "meta": (lambda: effcore.decompose(nn.Linear(32, 32, device="meta"), 2.0), "on the meta device; load them first"),
    "quantised": (lambda: effcore.decompose(quantised_model(), 2.0), "0 has quantised weights"),
    "report": (lambda: low_rank.report(plain()), "was not decomposed"),
    "module rank": (lambda: LowRankLinear(4, 5, 0), "rank must be from 1 to 4 .* got 0"),
    "module ranks": (lambda: LowRankConv2d(4, 5, 3, (4, 6)), r"ranks must be from 1 to out_channels \(5\), got \(4, 6\)"),
    "module branches": (lambda: LowRankConv2d(4, 6, 3, (4, 6), branches=4), "branches must divide both ranks"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert str(error.value).startswith("effcore.")


def test_what_is_left_alone():
    model = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(32, 32, 3, groups=32),
            "attention": nn.MultiheadAttention(32, 2),
            "few": nn.Linear(64, 10),
        }
    )
    effcore.decompose(model, 2.0)
    notes = {r.name: r.note for r in low_rank.report(model).layers}
    assert "32 groups" in notes["depthwise"] and "few" in notes["few"] and notes["attention.out_proj"]
    assert not any(isinstance(m, LowRankLinear | LowRankConv2d) for m in model.modules())


def test_report(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    effcore.decompose(model, 2.0, data=[torch.randn(256, 64)])
    result = low_rank.report(model)
    assert "ratio 2.0:" in result.table() and "0" in result.table()
    result.write_json(tmp_path / "r.json")
    result.plot(tmp_path / "r.png")
    loaded = json.loads((tmp_path / "r.json").read_text())
    assert loaded["parameters_before"] == 64 * 64 + 64 + 64 * 4 + 4 and (tmp_path / "r.png").stat().st_size > 1000


def test_compiled_and_channels_last():
    torch._dynamo.reset()
    conv = nn.Sequential(nn.Conv2d(32, 48, 3)).to(memory_format=torch.channels_last)
    effcore.decompose(conv, 1.6, multiple=1)
    assert conv[0].core.weight.is_contiguous(memory_format=torch.channels_last)
    layer = effcore.decompose(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)), 1.3, multiple=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 32)
    torch.testing.assert_close(compiled(x), layer(x))
    copied = copy.deepcopy(layer)
    torch.testing.assert_close(copied(x), layer(x))
