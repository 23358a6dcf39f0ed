"""Decomposed models while they train, merged, branched, saved and loaded."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import effcore
from effcore.errors import InputError
from effcore.methods import low_rank_layers, low_rank_merge, low_rank_ranks
from effcore.methods._gather import Processes
from effcore.methods.low_rank_callbacks import Freezing, ProgressiveDecomposition, SequentialFreezing, shrink
from effcore.methods.low_rank_checkpoint import DESCRIPTION, load_decomposed, save_decomposed
from effcore.methods.low_rank_factor import reorder
from effcore.methods.low_rank_fading import Fading, fade, set_share, settle
from effcore.methods.low_rank_merge import bottlenecks, branch, faster_branches, merge, timed_ranks
from effcore.methods.low_rank_ranks import pays
from effcore.nn.low_rank import LowRankConv2d, LowRankLinear
from tests.methods.test_low_rank import MODELS, hugging_face


def network():
    return effcore.decompose(
        nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 1), nn.Flatten(), nn.Linear(512, 32)), 1.5, multiple=1
    )


def trains(model):
    return {n for n, p in model.named_parameters() if p.requires_grad and "bias" not in n}


def test_freezing():
    model = network()
    Freezing().apply(model, 0, 0.0)
    assert trains(model) == {"0.core.weight", "1.last.weight", "3.up"}


def test_ranks_are_timed_as_frozen_factors_train(monkeypatch):
    """What is timed for "freezing" are factors whose outer ones are frozen, which can pay where training all does not."""
    seen = []

    def clock(self, key, module, seen_inputs):
        frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
        seen.append((self.training, type(module).__name__, frozen))
        return 1.0 if isinstance(module, nn.Conv2d | nn.Linear) else 2.0 - 1.5 * bool(frozen)

    monkeypatch.setattr(low_rank_ranks.Clock, "__call__", clock)
    for measure, ranks in (("freezing", 2), ("training", 0)):
        seen.clear()
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 16, 16))
        decomposed = effcore.decompose(model, 2.0, data=[torch.randn(2, 16, 4, 4)], measure=measure)
        assert sum(isinstance(m, LowRankConv2d | LowRankLinear) for m in decomposed) == ranks
        assert all(training for training, _, _ in seen)
        frozen = {kind: names for _, kind, names in seen if kind.startswith("LowRank")}
        outer = {"LowRankConv2d": ["first.weight", "last.weight"], "LowRankLinear": ["down"]}
        assert frozen == (outer if measure == "freezing" else {kind: [] for kind in outer})
        assert all(p.requires_grad for p in decomposed.parameters()), "the model itself is not frozen"


def test_sequential_freezing_alternates():
    model, schedule = network(), SequentialFreezing()
    inner = {"0.core.weight", "1.last.weight", "3.up"}
    outer = {"0.first.weight", "0.last.weight", "1.first.weight", "3.down"}
    for epoch, expected in ((0.0, inner), (0.9, inner), (1.0, outer), (1.5, outer), (2.0, inner)):
        schedule.apply(model, 0, epoch)
        assert trains(model) == expected
    with pytest.raises(ValueError, match="period must be positive"):
        SequentialFreezing(0)


def test_shrinking_is_the_truncated_svd_of_the_product():
    model = nn.Sequential(LowRankLinear(40, 30, 16))
    u, s, vh = torch.linalg.svd(model[0].weight.detach().double())
    assert shrink(model, 2.0) == ["0"]
    best = (u[:, :8] * s[:8]) @ vh[:8]
    torch.testing.assert_close(model[0].weight.double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fading", [False, True])
def test_progressive_decomposition_trains_on(fading):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = ProgressiveDecomposition((1.5, 2.0), every=3, start=2, options={"multiple": 1}, fade=fading)
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    ranks, kinds = [], []
    for step in range(10):
        schedule.apply(model, step, 0.0, optimizer)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ranks.append(getattr(getattr(model[0], "layer", model[0]), "rank", None))
        kinds.append(type(model[0]))
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == trained
    first = ranks[2]
    assert ranks[:2] == [None, None] and ranks[2:5] == [first] * 3 and ranks[5:] == [first // 2] * 5
    assert kinds[2:] == ([Fading] * 6 if fading else [LowRankLinear] * 6) + [LowRankLinear] * 2
    with pytest.raises(ValueError, match="ratios must be above 1"):
        ProgressiveDecomposition((1.0,), every=1)
    with pytest.raises(ValueError, match="every must be positive"):
        ProgressiveDecomposition((2.0,), every=0)


def test_stages_in_several_processes_come_before_the_wrapping(monkeypatch):
    monkeypatch.setattr(Processes, "count", 2)
    model = nn.Sequential(nn.Linear(32, 64))
    with pytest.raises(RuntimeError, match="would not add up the gradients"):
        ProgressiveDecomposition((2.0,), every=2).apply(model, 0, 0.0, torch.optim.SGD(model.parameters()))
    ProgressiveDecomposition((2.0,), every=2, fade=False).apply(model, 0, 0.0)
    assert isinstance(model[0], LowRankLinear)


def test_what_is_cut_off_fades(tmp_path):
    """A stage changes no output; then the outputs go straight to those of the factors, which stay the same parameters."""
    from transformers.pytorch_utils import Conv1D

    convolutions = (nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 3, padding=1))
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 32), Conv1D(40, 32), LowRankLinear(40, 48, 30))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    low_rank = model[5]
    x = torch.randn(3, 16, 4, 4)
    dense = model(x)
    schedule = ProgressiveDecomposition((2.0,), every=4, options={"multiple": 1})
    schedule.apply(model, 0, 0.0)
    kinds = [type(m) for m in model]
    assert [k is Fading for k in kinds] == [True, True, False, True, True, False] and model[5] is low_rank
    factors = {id(p) for m in model if isinstance(m, Fading) for p in m.layer.parameters()}
    set_share(model, 1.0)
    torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="layer 0 lost still fades"):
        save_decomposed(model, tmp_path)
    shares, layer, y = [], model[0], torch.randn(3, 16, 4, 4)
    expected = [layer.layer(y) + (1 - k / 5) * layer.rest(y) for k in (1, 2, 3, 4)]
    for step in range(4):
        schedule.apply(model, step, 0.0)
        shares.append(model[0].share.item())
        torch.testing.assert_close(model[0](y), expected[step])
    assert shares == pytest.approx([0.8, 0.6, 0.4, 0.2])
    set_share(model, 0.0)
    cut = model(x)
    schedule.apply(model, 4, 0.0)
    assert not any(isinstance(m, Fading) for m in model.modules())
    torch.testing.assert_close(model(x), cut)
    assert factors <= {id(p) for p in model.parameters()}
    shrunk = dict(model.named_modules())
    shrink(model, 2.0, only=["5"])
    expected = low_rank(torch.ones(1, 40))
    fade(model, shrunk)
    torch.testing.assert_close(model[5](torch.ones(1, 40)), expected, rtol=1e-4, atol=1e-5)
    settle(model)
    assert isinstance(model[5], LowRankLinear) and model[5].rank == 15


@pytest.mark.slow
def test_schedules_inside_the_trainer(tmp_path):
    import transformers

    model, _ = hugging_face("llama")
    rows = [{"input_ids": torch.randint(0, 50, (9,)), "labels": torch.randint(0, 50, (9,))} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )  # which is before the second stage has faded
    schedule = ProgressiveDecomposition((1.5, 2.0), every=2, start=1, options={"multiple": 1})
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[schedule.callback()])
    trainer.train()
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LowRankLinear) and schedule.stage == 2
    state = trainer.optimizer.state
    assert (
        any(p is layer.up for p in getattr(trainer.optimizer, "optimizer", trainer.optimizer).state)
        or layer.up in state
    )


def resnet_with_statistics(activation):
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[64, 96],
        depths=[2, 1],
        layer_type="bottleneck",
        num_labels=4,
        hidden_act="relu",
    )
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
        if not activation and type(module).__name__ == "ResNetConvLayer":
            module.activation = nn.Identity()
    return model.eval()


def test_merging_without_activations_is_exact():
    model, x = resnet_with_statistics(False), torch.randn(2, 3, 32, 32)
    before = model(x).logits
    errors = merge(model, ratio=1)
    assert len(errors) == len(bottlenecks(model)) == 3 and max(errors.values()) < 1e-6
    torch.testing.assert_close(model(x).logits, before, rtol=1e-3, atol=1e-3)


def test_merging_shrinks_and_trains():
    model, x = resnet_with_statistics(True), torch.randn(2, 3, 32, 32)
    before, names = sum(p.numel() for p in model.parameters()), len(list(model.modules()))
    errors = merge(model, 2.0, multiple=1)
    assert all(0 < e < 1 for e in errors.values())
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before and len(list(model.modules())) == names
    model.train()
    model(x).logits.square().mean().backward()
    with pytest.raises(ValueError, match="no bottleneck"):
        merge(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        merge(model, 0.5)


def test_frozen_layers_stay_frozen():
    model = resnet_with_statistics(True).requires_grad_(False)
    merge(model, 2.0, multiple=1)
    assert not any(p.requires_grad for p in model.parameters())
    model = nn.Sequential(LowRankConv2d(8, 8, 3, (4, 4)))
    low_rank_layers.freeze(model)
    branch(model, 2)
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True]  # first, core, last and its bias


def test_merging_at_given_ranks():
    model = resnet_with_statistics(True)
    names = [b.convs[1] for b in bottlenecks(model)]
    dense = {n: model.get_submodule(n).weight.shape for n in names}
    errors = merge(model, ranks={names[1]: (8, 6)})
    assert list(errors) == [names[1]]
    assert model.get_submodule(names[1]).weight.shape == (6, 8, 3, 3)
    assert all(model.get_submodule(n).weight.shape == dense[n] for n in (names[0], names[2]))
    with pytest.raises(ValueError, match=r"ranks names 'classifier.1'"):
        merge(model, ranks={"classifier.1": (8, 8)})
    with pytest.raises(ValueError, match=rf"rank of {names[0]} must be from"):
        merge(model, ranks={names[0]: (8, 17)})


@pytest.mark.parametrize("measure", ["inference", "training"])
def test_merging_goes_under_a_step_in_time(measure, monkeypatch):
    class Stepped(low_rank_merge.Clock):
        """Time is weights; kernels of more than eight channels take three times as long, those of 24 none at all."""

        def __call__(self, key, module, seen):
            assert seen.shape[1] == module.in_channels and self.training == (measure == "training")
            narrow = min(module.weight.shape[:2])
            return 0.0 if narrow == 24 else module.weight.numel() * (3.0 if narrow > 8 else 1.0)

    monkeypatch.setattr(low_rank_merge, "Clock", Stepped)
    model = resnet_with_statistics(True)
    blocks = bottlenecks(model)
    ranks = timed_ranks(model, 2.0, [torch.randn(2, 3, 32, 32)], multiple=1, measure=measure)
    assert ranks == {
        b.convs[1]: (8, 8) for b in blocks[:2]
    }  # 9 by the ratio; nothing is faster than the third's dense layers
    assert len(merge(model, ranks=ranks)) == 2
    with pytest.raises(ValueError, match="gave no batch"):
        timed_ranks(model, 2.0, [])


def test_merged_and_branched_convolutions_stay_channels_last():
    model = resnet_with_statistics(True).to(memory_format=torch.channels_last)
    merge(model, 2.0, multiple=1)
    branched = nn.Sequential(LowRankConv2d(24, 32, 3, (16, 24), padding=1)).to(memory_format=torch.channels_last)
    branch(branched, 4)
    for name, weight in [*model.named_parameters(), *branched.named_parameters()]:
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("stride", [1, 2])
def test_pairs_of_pointwise_convolutions_are_linear_layers_on_pixels(monkeypatch, stride):
    taken = []
    monkeypatch.setattr("effcore.nn.low_rank.stays_on_chip", lambda *t: taken.append([x.shape for x in t]) is None)
    conv = LowRankConv2d(24, 32, 1, (8, 8), stride=stride)
    x = torch.randn(2, 24, 6, 6).to(memory_format=torch.channels_last)
    out = conv(x)
    torch.testing.assert_close(out, nn.functional.conv2d(x, conv.weight, conv.bias, stride))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert taken == ([[(2, 6, 6, 24), (8, 24), (32, 8)]] if stride == 1 else [])


def test_branching_keeps_the_blocks_and_says_what_it_drops():
    model = nn.Sequential(LowRankConv2d(24, 32, 3, (16, 24), padding=1))
    dense, x = model[0].weight.detach(), torch.randn(2, 24, 8, 8)
    errors = branch(model, 4)
    conv = model[0]
    assert conv.branches == 4 and conv.core.groups == 4
    measured = ((conv.weight - dense).norm() / dense.norm()).item()
    assert errors["0"] == pytest.approx(measured, rel=1e-4)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="branches must be at least 2"):
        branch(model, 1)
    with pytest.raises(ValueError, match="no low-rank convolution"):
        branch(model, 5)


def test_reordering_finds_hidden_blocks():
    energy = torch.full((12, 8), 0.01)
    rows, columns = torch.randperm(12), torch.randperm(8)
    for b in range(4):
        energy[rows[3 * b : 3 * b + 3, None], columns[None, 2 * b : 2 * b + 2]] = 1.0
    row_order, column_order = reorder(energy, 4)
    ordered = energy[row_order][:, column_order]
    for b in range(4):
        assert (ordered[3 * b : 3 * b + 3, 2 * b : 2 * b + 2] == 1).all()


@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded_without_the_original(kind, tmp_path):
    model, batch = hugging_face(kind)
    effcore.decompose(model.eval(), 1.6, multiple=1)
    if kind == "llama":
        model.generation_config.eos_token_id = [3, 5]
    save_decomposed(model, tmp_path)
    loaded = load_decomposed(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    if kind == "llama":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.generation_config.eos_token_id == [3, 5]


@pytest.mark.parametrize("kind", ["shared", "flowhn"])
def test_our_own_models_are_loaded_too(kind, tmp_path):
    model, batch = hugging_face("llama")
    if kind == "shared":
        model = effcore.share_activations(model, mode="qk", start=1)
    else:
        model = effcore.FlowHNForCausalLM(
            effcore.FlowHNConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=2, routing_length=16)
        )  # fmt: skip
    effcore.decompose(model.eval(), 1.6, multiple=1)
    save_decomposed(model, tmp_path)
    code = "import sys, effcore.methods.low_rank_checkpoint as c; print(type(c.load_decomposed(sys.argv[1])).__name__)"
    shown = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == type(model).__name__
    with torch.no_grad():
        assert torch.equal(load_decomposed(tmp_path)(**batch).logits, model(**batch).logits)


def test_the_rotary_frequencies_of_a_bfloat16_model_are_not_rounded(tmp_path):
    hugging_face("llama")[0].save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()
    effcore.decompose(model, 1.6, multiple=1)
    save_decomposed(model, tmp_path / "small")
    loaded = load_decomposed(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_positions_of_a_loaded_bfloat16_model_are_not_rounded(tmp_path):
    model, batch = hugging_face("llama")
    model = type(model)._from_config(model.config, dtype=torch.bfloat16).eval()
    effcore.decompose(model, 1.6, multiple=1)
    save_decomposed(model, tmp_path)
    loaded = load_decomposed(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("measure", ["inference", "training"])
def test_only_what_is_faster_branches(measure, monkeypatch):
    model = nn.Sequential(*(LowRankConv2d(32, 32, 3, (r, 16), padding=1) for r in (16, 8, 10)))
    groups = {16: 1.0, 8: 2.0}  # milliseconds of a core with groups; of a whole one always 1.5
    monkeypatch.setattr(
        low_rank_merge.Clock,
        "__call__",
        lambda self, key, module, seen: groups[seen.shape[1]] if module.groups > 1 else 1.5,
    )
    names = faster_branches(model, 4, [torch.randn(2, 32, 8, 8)], measure=measure)
    assert names == ["0"], "the second is slower, 4 does not divide the third's ranks"
    assert list(branch(model, 4, include=names)) == ["0"] and [c.branches for c in model] == [4, 1, 1]
    monkeypatch.undo()
    clock, times = low_rank_merge.Clock.__call__, {}

    def noted(self, key, module, seen):
        return times.setdefault((seen.shape[1], module.groups), clock(self, key, module, seen))

    monkeypatch.setattr(low_rank_merge.Clock, "__call__", noted)
    names = faster_branches(model, 2, [torch.randn(2, 32, 8, 8)], measure=measure)
    assert set(times) == {(8, 1), (8, 2), (10, 1), (10, 2)} and min(times.values()) > 0
    assert names == [n for n, r in (("1", 8), ("2", 10)) if pays(times[r, 2], times[r, 1])]
    with pytest.raises(ValueError, match="branches must be at least 2"):
        faster_branches(model, 1, [])


def test_branching_nothing_and_what_is_not_there(monkeypatch):
    model = nn.Sequential(LowRankConv2d(24, 32, 3, (16, 24), padding=1), nn.Conv2d(32, 8, 1))
    monkeypatch.setattr(low_rank_merge.Clock, "__call__", lambda self, key, module, seen: float(module.groups))
    names = faster_branches(model, 4, [torch.randn(2, 24, 8, 8)])
    assert names == [] and branch(model, 4, include=names) == {} and model[0].branches == 1
    for absent in ("1", "2"):
        with pytest.raises(ValueError, match=f"include names '{absent}', which is not a low-rank convolution"):
            branch(model, 4, include=["0", absent])
    assert model[0].branches == 1
    with pytest.raises(ValueError, match="branches must be at least 2"):
        branch(model, 1, include=[])


def test_merged_and_branched_models_are_saved_too(tmp_path):
    model, x = resnet_with_statistics(True), torch.randn(2, 3, 32, 32)
    merge(model, 2.0, multiple=1)
    effcore.decompose(model, 1.5, multiple=2, include=["layer.1.convolution"])
    branch(model, 2)
    save_decomposed(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_decomposed(tmp_path)(x).logits, model(x).logits)


def test_damaged_checkpoints_are_named(tmp_path):
    with pytest.raises(InputError, match=r"low_rank\.json: not a decomposed model"):
        load_decomposed(tmp_path)
    save_decomposed(network(), tmp_path)
    with pytest.raises(InputError, match=r"pass model="):
        load_decomposed(tmp_path)
    with pytest.raises(InputError, match=r"layer \d does not fit the architecture"):
        load_decomposed(tmp_path, nn.Sequential(nn.Linear(3, 3)).requires_grad_())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    skeleton = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 1), nn.Flatten(), nn.Linear(512, 32))
    with pytest.raises(InputError, match="cannot be read"):
        load_decomposed(tmp_path, skeleton)
    for content in ("{", '{"layers": [3]}'):
        (tmp_path / DESCRIPTION).write_text(content)
        with pytest.raises(InputError, match="not a decomposed model"):
            load_decomposed(tmp_path, skeleton)
    (tmp_path / DESCRIPTION).write_text('{"layers": {"0": 3}}')
    with pytest.raises(InputError, match="layer 0 does not fit"):
        load_decomposed(tmp_path, skeleton)
