"""The claim of Bayesian-MoE: its task, its models and its verdict."""

import torch

from benchmarks.claims._bayesian_data import ANSWERS, ASK, LENGTH, PACKAGES, all_labels, make_data, separate
from benchmarks.claims._bayesian_models import all_logits, fresh
from benchmarks.claims.bayesian_moe import summary


def test_code_and_prose_are_told_apart():
    code, prose = separate(
        'x = 1  # why\ndef f():\n    """A docstring that is long enough to be counted as prose."""\n'
    )
    assert "why" not in code and "docstring" not in code and "def f" in code
    assert "why" in prose and "docstring" in prose and "def" not in prose.split()


def test_the_task_has_all_answers_and_no_piece_in_two_parts():
    data = make_data(train=160, test=80, batch=32)
    assert set(data) == {"train", "fit", "held", "test", "other"}
    rows = {name: torch.cat([b["input_ids"] for b in batches]) for name, batches in data.items()}
    assert all(r.shape[1] == LENGTH + 1 and (r[:, -1] == ASK).all() for r in rows.values())
    assert len(rows["train"]) == 160 and torch.equal(rows["train"], rows["fit"])
    assert all_labels(data["train"]).bincount().tolist() == [20] * len(PACKAGES)
    pieces = {name: {tuple(row) for row in r.tolist()} for name, r in rows.items()}
    for one, other in (("train", "held"), ("train", "test"), ("held", "test"), ("train", "other")):
        assert not pieces[one] & pieces[other]


def test_every_expert_on_every_token_gives_the_model_s_own_logits():
    model = fresh(0, "cpu").eval()
    batch = [{"input_ids": torch.randint(0, 4096, (3, LENGTH + 1))}]
    ours = all_logits(model, batch)
    model.config._experts_implementation = "eager"
    assert ours.shape == (3, len(ANSWERS))
    torch.testing.assert_close(ours, all_logits(model, batch))


def test_the_verdict_counts_misses():
    def row(accuracy, nll, ece, other):
        scores = {"accuracy": accuracy, "nll": nll, "ece": ece, "brier": 0.5}
        return {"test": scores, "other": scores | {"nll": other}, "ood_auroc": 0.6}

    good = {"MAP": row(0.5, 2, 0.3, 3), "temperature": row(0.5, 1.5, 0.1, 2), "Bayesian-MoE": row(0.501, 1.4, 0.1, 1.9)}
    assert "MISSED" not in summary([good, good])
    bad = good | {"Bayesian-MoE": row(0.49, 2.1, 0.2, 3.1)}
    assert summary([bad]).count("MISSED") == 5
