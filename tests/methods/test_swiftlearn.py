"""SwiftLearn: what is recorded, what is drawn, and that stopping and resuming changes nothing."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

import effcore
from effcore.methods import importance
from effcore.methods.importance import Standard, draw, squared_change, token_log_probs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the arithmetic


def test_importance_is_the_squared_change():
    old, new = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[3.0, 5.0], [2.0, 2.0]])
    assert squared_change(new, old).tolist() == [25.0, 0.0]
    assert squared_change(new, old, torch.tensor([5, 0])).tolist() == [5.0, 0.0]


def test_token_log_probs_against_log_softmax():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    values, counts = token_log_probs(logits, labels)
    exact = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(values, exact * (labels[:, 1:] != -100))
    assert counts.tolist() == [2, 4]


@pytest.mark.parametrize("select", importance.SELECTIONS)
@pytest.mark.parametrize("samples, count", [(1, 1), (7, 3), (1000, 999), (1000, 1000)])
def test_a_draw_is_without_replacement(select, samples, count):
    chosen = draw(torch.rand(samples), count, select=select, sigma=1.0, generator=generator())
    assert chosen.dtype == torch.int64 and len(chosen.unique()) == len(chosen) == count
    assert chosen.min() >= 0 and chosen.max() < samples


def test_gumbel_draws_with_the_softmax_probabilities():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    probabilities = (1.5 * Standard.of(values, 1.5).scores(values)).softmax(0)
    g, hits = generator(), torch.zeros(5)
    for _ in range(4000):
        hits[draw(values, 1, select="gumbel", sigma=1.5, generator=g)] += 1
    torch.testing.assert_close(hits / 4000, probabilities, atol=0.03, rtol=0)


def test_topk_takes_the_largest_and_ties_at_random():
    values = torch.tensor([5.0, 1.0, 1.0, 1.0, 4.0])
    seen = set()
    for seed in range(30):
        chosen = draw(values, 3, select="topk", sigma=1.0, generator=generator(seed)).tolist()
        assert {0, 4} < set(chosen)
        seen |= set(chosen)
    assert seen == {0, 1, 2, 3, 4}


def test_unmeasured_samples_count_as_the_mean_and_equal_ones_prefer_none():
    values = torch.tensor([1.0, torch.nan, 3.0])
    assert Standard.of(values, 1.0).scores(values).tolist() == [-1.0, 0.0, 1.0]
    for equal in (torch.full((4,), 2.5), torch.zeros(4), torch.full((4,), torch.nan)):
        standard = Standard.of(equal, 1.0)
        assert standard.is_constant and not standard.scores(equal).any()


@pytest.mark.parametrize("again", [False, True], ids=["once", "repeated"])
def test_recordings_that_wait_are_stored_as_if_one_by_one(again, monkeypatch):
    """Joined or not: a sample that occurs twice while they wait has its change measured between the two."""
    batches = [torch.randperm(40, generator=generator(epoch)).split(5) for epoch in range(2)]
    values = [torch.randn(40, 3, generator=generator(epoch)) for epoch in range(2)]
    states = []
    for waiting in (1, 100):
        monkeypatch.setattr("effcore.methods._recordings.PENDING", waiting)
        sampler = effcore.SwiftLearnSampler(40, 0.5, epochs=3)
        for epoch in range(2):
            for ids in batches[epoch]:
                sampler.record(ids, values[epoch][ids])
            if not again:
                sampler._changes.share()
        states.append(sampler.state_dict())
    for name in ("values", "change", "recordings"):
        assert torch.equal(states[0][name], states[1][name]), name
    torch.testing.assert_close(states[0]["change"], (values[1] - values[0]).square().sum(1))


def test_detrended_leaves_what_is_the_samples_own():
    samples = 64 * 512
    own = torch.empty(samples).exponential_(generator=generator())
    places = [torch.randperm(samples, generator=generator(1 + i)) for i in range(2)]
    change = own * torch.exp(3 * places[1] / samples - 4 * places[0] / samples)
    change[::100] = torch.nan
    found = importance.detrended(change, places)
    known = ~change.isnan()
    few = change[1:99]
    assert torch.equal(found.isnan(), ~known) and torch.equal(importance.detrended(few, places), few)
    assert found[known].mean().item() == pytest.approx(change[known].mean().item(), rel=0.05)
    like = lambda x: torch.corrcoef(torch.stack([x[known].log(), own[known].log()]))[0, 1].item()  # noqa: E731
    assert like(change) < 0.75 and like(found) > 0.99


@pytest.mark.parametrize("detrend", [True, False])
def test_when_a_sample_was_visited_does_not_make_it_important(detrend):
    """Outputs that near their ends with the step, those of some samples farther away."""
    sampler = effcore.SwiftLearnSampler(4096, 0.1, epochs=3, select="topk", detrend=detrend)
    ends = 1 + torch.rand(4096, 1, generator=generator())
    step, visited = 0, []
    for epoch in range(2):
        visited.append(sampler.order(epoch))
        for ids in visited[-1].split(32):
            step += 1
            sampler.record(ids, ends[ids] * (1 - math.exp(-step / 100)))
    early = torch.isin(sampler.order(2), visited[0][:1024]).float().mean()
    assert (early < 0.4) if detrend else (early > 0.8)


@pytest.mark.slow
def test_ten_million_samples_are_drawn_in_about_a_second():
    values, threads = torch.rand(10_000_000), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            draw(values, 1_000_000, select="gumbel", sigma=1.0, generator=generator())
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 20, times  # about a second of one processor; others may be busy


# ---------------------------------------------------------------- the sampler


class Items(torch.utils.data.Dataset):
    """Points of two classes; a third of them lie on the border and keep moving."""

    def __init__(self, count=90):
        g = generator(3)
        self.y = torch.arange(count) % 2
        scale = torch.where(torch.arange(count) % 3 == 0, 0.05, 2.0)[:, None]
        self.x = torch.randn(count, 4, generator=g) * 0.3 + (2 * self.y[:, None] - 1) * scale

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}


def run(sampler, data=None, *, batch_size=8, stop=None, state=None, **options):
    """A plain loop; returns what was visited and the model's weights, or the state after ``stop`` steps."""
    data = data or Items()
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    if state is not None:
        sampler.load_state_dict(state["sampler"])
        model.load_state_dict(state["model"])
    visited = []
    for step, (ids, batch) in enumerate(sampler.batches(data, batch_size, **options), 1):
        logits = model(batch["x"])
        sampler.record(ids, logits)
        losses = nn.functional.cross_entropy(logits, batch["y"], reduction="none")
        (losses * sampler.weights(ids)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        visited += ids.tolist()
        if step == stop:
            return visited, {"sampler": sampler.state_dict(), "model": model.state_dict()}
    return visited, model.weight.detach().clone()


def test_a_run_has_the_length_that_it_says():
    sampler = effcore.SwiftLearnSampler(90, 0.1, epochs=5)
    visited, _ = run(sampler)
    assert len(visited) == len(sampler) == 2 * 90 + 3 * 9
    assert sampler.total_steps(8) == 2 * 12 + 3 * 2
    assert sorted(visited[:90]) == sorted(visited[90:180]) == list(range(90))
    progress = [sampler.progress(step, 8) for step in (0, 6, 12, 24, 25, 30, 31)]
    assert progress == pytest.approx([0, 0.1, 0.2, 0.4, 0.5, 1, 1])
    assert sampler.progress(6, 4, processes=2) == progress[1]
    assert effcore.SwiftLearnSampler(1000, 0.1).speedup_ceiling == pytest.approx(1 / 0.28)


def test_it_keeps_the_samples_whose_outputs_moved():
    data = Items()
    sampler = effcore.SwiftLearnSampler(data, 0.2, epochs=4, select="topk")
    torch.manual_seed(0)
    weights = iter([torch.randn(4, 2), torch.randn(4, 2)])
    want, w = [], None
    records = [{}, {}]
    for steps, (ids, batch) in enumerate(sampler.batches(data, 90)):
        if steps < 2:
            w = next(weights)
            for i, row in zip(ids.tolist(), batch["x"] @ w, strict=True):
                records[steps][i] = row
        else:
            want = sorted(want or ids.tolist())
            assert sorted(ids.tolist()) == want
        sampler.record(ids, batch["x"] @ w)
    moved = {i: (records[1][i] - records[0][i]).square().sum().item() for i in range(90)}
    assert want == sorted(sorted(moved, key=moved.get)[-18:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": "topk"},
        {"select": "random"},
        {"refresh_every": 2, "refresh": "visited"},
        {"refresh_every": 2},
        {"detrend": True},
        {"recording": "evaluation"},
        {"max_weight": 3.0},
        {"keep": 1.0},
    ],
    ids=str,
)
def test_interrupted_and_resumed_equals_uninterrupted(options):
    data = Items()
    probe = torch.randn(4, 2, generator=generator(5))
    extra = {"forward": lambda batch: batch["x"] @ probe}
    make = lambda: effcore.SwiftLearnSampler(data, **({"keep": 0.3, "epochs": 7} | options))  # noqa: E731
    whole, weights = run(make(), data, **extra)
    steps = make().total_steps(8)
    for stop in (1, 11, 12, 13, 24, 25, 29, steps - 1):
        first, state = run(make(), data, stop=stop, **extra)
        rest, again = run(make(), data, state=state, **extra)
        assert first + rest == whole, f"stopped after step {stop} of {steps}"
        assert torch.equal(again, weights)


def test_epochs_are_drawn_anew_and_depend_on_the_seed():
    epochs = lambda **options: [  # noqa: E731
        sorted(s.order(e).tolist()) for s in [effcore.SwiftLearnSampler(90, 0.3, epochs=4, **options)] for e in (2, 3)
    ]
    with pytest.warns(UserWarning, match="no sample has two recordings; the draw is uniform"):
        one, two = epochs()
    assert one != two
    assert epochs(select="random") == epochs(select="random") != epochs(select="random", seed=1)


def test_the_state_of_something_else_is_refused():
    state = effcore.SwiftLearnSampler(90, 0.3).state_dict()
    with pytest.raises(ValueError, match="the state is of 90 samples, the dataset has 91"):
        effcore.SwiftLearnSampler(91, 0.3).load_state_dict(state)
    with pytest.raises(ValueError, match="the state was made with"):
        effcore.SwiftLearnSampler(90, 0.2).load_state_dict(state)
    for options in ({"warmup_epochs": 3}, {"max_weight": 2.0}):
        with pytest.raises(ValueError, match=f"'{next(iter(options))}': "):
            effcore.SwiftLearnSampler(90, 0.3, **options).load_state_dict(state)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0.0}, "keep must be above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, "keep must be above 0"),
        ({"keep": float("nan")}, "keep must be above 0"),
        ({"select": "best"}, "select must be gumbel, topk or random, got 'best'"),
        ({"warmup_epochs": 1}, "a change needs two recordings"),
        ({"epochs": 1}, "epochs must be at least warmup_epochs"),
        ({"sigma": -1.0}, "sigma must not be negative"),
        ({"refresh_every": 0}, "refresh_every must be positive"),
        ({"refresh": "some"}, "refresh must be all or visited"),
        ({"recording": "test"}, "recording must be training or evaluation"),
        ({"max_weight": 0.5}, "max_weight must be at least 1"),
        ({"dataset": 0}, "the dataset must not be empty"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        effcore.SwiftLearnSampler(**({"dataset": 10} | settings))


def test_bad_records():
    sampler = effcore.SwiftLearnSampler(4)
    with pytest.raises(ValueError, match=r"expected ids \[B\] and values \[B, W\]"):
        sampler.record(torch.tensor([0, 1]), torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"expected ids \[B\] and values \[B, W\]"):
        sampler.record(torch.tensor([0, 1]), torch.zeros(3, 2))
    sampler.record(torch.tensor([0, 4]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="sample numbers must be from 0 to 3, got 0 to 4"):
        sampler.state_dict()
    with pytest.raises(RuntimeError, match="score_with"):
        effcore.SwiftLearnSampler(4, recording="evaluation").order(1)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        next(effcore.SwiftLearnSampler(90).batches(Items(), 0))
    with pytest.raises(ValueError, match="forward is needed"):
        next(effcore.SwiftLearnSampler(90, recording="evaluation").batches(Items(), 4))


def test_outputs_that_are_not_finite_are_left_out():
    sampler = effcore.SwiftLearnSampler(3, 0.4, epochs=3, select="topk")
    everyone = torch.arange(3)
    sampler.record(everyone, torch.zeros(3, 2))
    sampler.record(everyone, torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [3.0, 0.0]]))
    with pytest.warns(UserWarning, match="outputs of sample 1 are not finite"):
        assert sampler.order(2).tolist() == [2]


@pytest.mark.parametrize("width", [1, 3])
def test_constant_outputs_and_one_class(width):
    sampler = effcore.SwiftLearnSampler(20, 0.5, epochs=3, select="topk")
    for _ in range(2):
        sampler.record(torch.arange(20), torch.ones(20, width))
    with pytest.warns(UserWarning, match="all importances are equal; the draw is uniform"):
        assert len(sampler.order(2).unique()) == 10


def test_weights_undo_the_probabilities_up_to_the_limit():
    sampler = effcore.SwiftLearnSampler(50, 0.5, epochs=3, max_weight=4.0)
    assert sampler.weights(torch.tensor([3])).tolist() == [1.0]
    values = torch.linspace(1, 3, 50)[:, None]
    sampler.record(torch.arange(50), torch.zeros(50, 1))
    sampler.record(torch.arange(50), values)
    sampler.order(2)
    change = values[:, 0].square()
    probabilities = Standard.of(change, 1.0).scores(change).softmax(0)
    torch.testing.assert_close(sampler.weights(torch.arange(50)), (1 / (50 * probabilities)).clamp(max=4.0))


def test_sequences_of_growing_length():
    sampler = effcore.SwiftLearnSampler(2, 0.5, epochs=3, select="topk")
    for logits_scale in (1.0, 2.0):
        for i, length in enumerate((4, 6)):
            logits = torch.zeros(1, length, 3)
            logits[..., 0] = logits_scale * i
            sampler.record_language(torch.tensor([i]), logits, torch.zeros(1, length, dtype=torch.long))
    assert sampler.order(2).tolist() == [1]
