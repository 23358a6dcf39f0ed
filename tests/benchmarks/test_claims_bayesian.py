"""The claim of Bayesian-MoE: its tasks, its models and its verdict."""

import argparse
import json

import pytest
import torch

from benchmarks.claims import _bayesian_lines as lines
from benchmarks.claims import _bayesian_text as text
from benchmarks.claims import bayesian_moe as claim
from benchmarks.claims._bayesian_classifier import fresh, logits_of
from benchmarks.claims._bayesian_packages import ANSWERS, ASK, LENGTH, PACKAGES, make_data, separate
from benchmarks.claims._bayesian_task import Task, all_labels
from benchmarks.claims.bayesian_moe import determined, summary
from effcore.data.questions import Question
from effcore.methods.bayesian_moe import laplace
from effcore.reference.kronecker import dense_factor
from tests.methods.laplace_toys import data, toy


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
    batch = {"input_ids": torch.randint(0, 4096, (3, LENGTH + 1))}
    ours = logits_of(model, batch)
    model.config._experts_implementation = "eager"
    assert ours.shape == (3, len(ANSWERS))
    torch.testing.assert_close(ours, logits_of(model, batch))


# ---------------------------------------------------------------- which line comes next


@pytest.fixture(scope="module")
def sources():
    return text.find_sources(1 << 20)


@pytest.fixture(scope="module")
def tokenizer(sources):
    return text.learn_tokens(sources.pretraining)


def test_no_file_is_in_two_parts(sources):
    parts = [sources.pretraining, *sources.parts.values()]
    assert all(parts) and sum(f.size for f in sources.pretraining) < 2 << 20
    paths = [f.path for part in parts for f in part]
    assert len(set(paths)) == len(paths)
    assert {f.path.suffix for f in sources.parts["other"]} <= {".h", ".hpp", ".cuh"}


def test_files_for_development_are_not_scored(sources):
    others = text.find_sources(1 << 20, development=True)
    for part in ("test", "other"):
        assert others.parts[part] and not set(others.parts[part]) & set(sources.parts[part])
    assert others.pretraining == sources.pretraining and others.parts["held"] == sources.parts["held"]


def test_tokens_give_the_text_back(sources, tokenizer):
    file = sources.pretraining[0]
    ids = text.encode_files(tokenizer, [file])
    assert ids[-1] == text.END and ids.max() < text.VOCABULARY
    assert tokenizer.decode(ids[:-1]) == file.path.read_text(encoding="utf-8", errors="ignore")


def test_batches_hold_every_question_once_with_its_answer(tokenizer):
    questions = [Question("x = 1\n" * n, ("a + b", "c", "d * e * f", f"last {n}"), n % 4) for n in range(1, 12)]
    found = {}
    for batch in text.batches(tokenizer, questions, 3):
        for ids, last, label in zip(*(batch[k].tolist() for k in ("input_ids", "last", "labels")), strict=True):
            rows = [tokenizer.decode(row[: at + 1]) for row, at in zip(ids, last, strict=True)]
            assert all(set(row[at + 1 :]) <= {text.PAD} for row, at in zip(ids, last, strict=True))
            found[rows[3]] = rows, label
    assert len(found) == 11
    for q in questions:
        rows = [f"{q.text}\n{choice}\n" for choice in q.choices]
        assert found[rows[3]] == (rows, q.answer)


def test_padding_does_not_change_what_is_chosen():
    model = lines.Chooser(lines.fresh(0, "cpu", width=64, layers=2), 0).eval()
    ids, last = torch.randint(2, 500, (2, 4, 9)), torch.tensor([[8, 5, 6, 7], [3, 8, 8, 2]])
    padded = torch.nn.functional.pad(ids, (0, 7), value=text.PAD)
    torch.testing.assert_close(model(ids, last), model(padded, last))
    assert model(ids, last).shape == (2, 4)


def test_a_posterior_of_a_chooser_is_that_of_its_four_rows():
    """Four rows of tokens are one example: the covariance is the Jacobian's, over the tokens of all of them."""
    model = lines.Chooser(lines.fresh(1, "cpu", width=64, layers=1, experts=2), 1).eval()
    batch = {
        "input_ids": torch.randint(2, 500, (3, 4, 6)),
        "last": torch.full((3, 4), 5),
        "labels": torch.tensor([0, 1, 3]),
    }
    posterior = laplace(model, [batch], hessian="kron", prior_variance=1e-12)
    _, covariance = posterior.logit_distribution(batch)
    weight = model.body.layers[0].mlp.experts.down_proj
    for b in range(3):
        one = {k: t[b : b + 1] for k, t in batch.items()}
        rows = [torch.autograd.grad(lines.logits_of(model, one)[0, c], weight, retain_graph=False)[0] for c in range(4)]
        jacobian = torch.stack(rows).flatten(1).double()
        torch.testing.assert_close(covariance[b].double() / 1e-12, jacobian @ jacobian.mT, rtol=1e-3, atol=1e-5)


def test_pretraining_learns_and_adapters_leave_the_rest():
    model = lines.fresh(0, "cpu", width=64, layers=1, experts=2)
    tokens = (torch.arange(20_000) % 7 + 2).numpy().astype("uint16")
    about = lines.pretrain(model, tokens, steps=12, seconds=1e9, batch=1, rate=1e-2, seed=0, compiled=False)
    assert about["loss"] < 8.5 and about["tokens"] == 12 * lines.WINDOW
    adapted = lines.with_adapters(model, 0)
    kept = {name: p.clone() for name, p in adapted.named_parameters()}
    data = [
        {"input_ids": torch.randint(2, 9, (2, 4, 5)), "last": torch.full((2, 4), 4), "labels": torch.tensor([1, 2])}
    ]
    lines.fine_tune(adapted, data, 2, 1e-2, 0)
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, kept[name])}
    assert moved and all("lora_" in name or "head.modules_to_save" in name for name in moved)


def test_a_task_scores_all_of_a_part():
    data = {"test": [{"labels": torch.tensor([1, 0])}, {"labels": torch.tensor([2])}]}
    task = Task(data, None, None, lambda model, batch: model[batch["labels"]])
    assert torch.equal(task.logits(torch.eye(3), "test").argmax(1), task.labels("test"))


# ---------------------------------------------------------------- what is there already


def scored(accuracy, nll, ece, other):
    scores = {"accuracy": accuracy, "nll": nll, "ece": ece, "brier": 0.5}
    return {"test": scores, "other": scores | {"nll": other}, "ood_auroc": 0.6, "gained": 3, "lost": 2}


GOOD = {
    "MAP": scored(0.5, 2, 0.3, 3),
    "temperature": scored(0.5, 1.5, 0.1, 2),
    "Bayesian-MoE": scored(0.501, 1.4, 0.1, 1.9),
}


def test_a_seed_of_other_settings_is_neither_skipped_nor_averaged(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        return claim.main(["--device", "cpu", "--out", str(tmp_path), *arguments])

    def run(seed, task, options):
        record = {"seed": seed, "settings": claim.settings_of(options), "methods": GOOD, "complete": True}
        claim.file_of(options.out, seed).write_text(json.dumps(record))

    monkeypatch.setattr(claim, "make_task", lambda options: None)
    monkeypatch.setattr(claim, "run_seed", run)
    assert call("--seeds", "1", "--json", str(tmp_path / "all.json")) == 0
    monkeypatch.delattr(claim, "run_seed")  # seed 1 is there
    assert call("--seeds", "1") == 0
    with pytest.raises(SystemExit, match=r"seed1.json holds rows with another epochs, rank: give another --out"):
        call("--seeds", "1", "--epochs", "4", "--rank", "9")
    monkeypatch.setattr(claim, "run_seed", run, raising=False)
    assert call("--seeds", "2", "--epochs", "4") == 1
    assert "seeds 1 and 2 were run with another epochs" in capsys.readouterr().out


def test_a_member_s_logits_are_those_of_its_settings(tmp_path, monkeypatch):
    options = argparse.Namespace(out=tmp_path, json=None, picture=None, rank=3)
    logits = {"test": torch.randn(2, 4)}
    claim.write_safetensors(claim.member_file(options, 5), logits, {"settings": {"rank": 3}})
    assert torch.equal(claim.logits_of_member(5, None, options)["test"], logits["test"])
    options.rank = 4
    monkeypatch.setattr(claim, "member", lambda number, task, options: (None, "trained"))
    assert claim.logits_of_member(5, None, options) == "trained"


# ---------------------------------------------------------------- the verdict


def test_what_the_data_determine_is_the_dense_trace():
    posterior = laplace(toy(), [data()], targets="last", hessian="kron")
    a, b = (dense_factor(*factor)[0] for factor in posterior.layers[0].factors)
    scaled = 0.5 * torch.kron(a, b)
    expected = torch.linalg.solve(torch.eye(len(scaled), dtype=scaled.dtype) + scaled, scaled).trace()
    assert determined(posterior, [0.5]) == pytest.approx([expected.item()])


def test_the_verdict_counts_misses():
    assert "MISSED" not in summary([GOOD, GOOD])
    bad = GOOD | {"Bayesian-MoE": scored(0.49, 2.1, 0.2, 3.1)}
    assert summary([bad]).count("MISSED") == 5
