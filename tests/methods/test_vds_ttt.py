"""VDS-TTT: verifiers, thresholds, the loss, both modes, and that an interrupted run goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import effcore
from effcore.data import byte_tokenizer
from effcore.errors import InputError
from effcore.methods.sampling import Response
from effcore.methods.vds_report import measure, table
from effcore.methods.vds_ttt import LoraSettings
from effcore.methods.verifiers import (
    ClassifierVerifier,
    ProcessRewardVerifier,
    VerifierError,
    calibrate,
    checked_scores,
    train_verifier,
)
from tests.methods.test_sampling import model as tiny_model

QUERIES = [f"{i} + {i + 1} =" for i in range(6)]


class Likes:
    """Prefers responses with many even bytes; counts how often it is asked."""

    def __init__(self, at_most=1.0):
        self.asked, self.at_most = 0, at_most

    def score(self, prompts, responses):
        self.asked += len(responses)
        assert len(prompts) == len(responses)
        return [self.at_most * sum(b % 2 == 0 for b in r.encode()) / max(len(r.encode()), 1) for r in responses]


def model(sharing=None):
    return tiny_model(sharing).float()


def learner(verifier=None, *, sharing=None, **options):
    return effcore.VerifierTTT(
        model(sharing),
        byte_tokenizer(),
        verifier or Likes(),
        **(
            {
                "num_samples": 4,
                "threshold": 0.2,
                "max_new_tokens": 8,
                "lora": LoraSettings(rank=4, alpha=8, dropout=0.1),
                "learning_rate": 1e-2,
                "batch_size": 2,
                "generation_batch": 2,
            }
            | options
        ),
    )


def weights(adapted):
    return torch.cat([p.detach().flatten() for name, p in sorted(adapted.named_parameters()) if "lora" in name])


# ---------------------------------------------------------------- verifiers


def test_adapters_for_classifiers_and_process_reward_models():
    tokenizer = byte_tokenizer()
    small = BertConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    prompts, responses = ["1+1=", "22+22="], ["2", "four hundred"]
    for labels in (1, 3):
        small.num_labels = labels
        m = BertForSequenceClassification(small).eval()
        got = ClassifierVerifier(m, tokenizer, positive=1 if labels > 1 else 0).score(prompts, responses)
        for p, r, score in zip(prompts, responses, got, strict=True):
            logits = m(torch.tensor([tokenizer(p + r)["input_ids"]])).logits[0]
            want = logits.sigmoid()[0] if labels == 1 else logits.softmax(0)[1]
            assert score == pytest.approx(want.item(), abs=1e-6)
    small.num_labels = 2
    m = BertForTokenClassification(small).eval()
    got = ProcessRewardVerifier(m, tokenizer, separator="\n").score(prompts, ["a\nb\n", "c"])
    for p, r, score in zip(prompts, ["a\nb\n", "c\n"], got, strict=True):
        want = m(torch.tensor([tokenizer(p + r)["input_ids"]])).logits[0, -1].softmax(0)[1]
        assert score == pytest.approx(want.item(), abs=1e-6)


def test_a_verifier_learns_from_checked_responses():
    torch.manual_seed(0)
    small = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=257,
        )
    )
    responses = [f"{'yes' if i % 2 else 'no'} {i}" for i in range(60)]
    correct = [bool(i % 2) for i in range(60)]
    verifier = train_verifier(
        small, byte_tokenizer(), ["?"] * 60, responses, correct, steps=60, batch_size=16, learning_rate=5e-3
    )
    scores = verifier.score(["?"] * 2, ["yes 99", "no 98"])
    assert scores[0] > 0.9 > 0.1 > scores[1]
    with pytest.raises(ValueError, match="needs right and wrong responses, got 0 right and 60 wrong"):
        train_verifier(small, byte_tokenizer(), ["?"] * 60, responses, [False] * 60, steps=1)


@pytest.mark.parametrize(
    "scores, message",
    [
        ([0.5], "returned 1 scores for 2 responses"),
        ([0.5, float("nan")], r"score nan is not from 0 to 1 \(response 'b' to 'q'\)"),
        ([1.5, 0.5], "score 1.5 is not"),
        ([-0.1, 0.5], "score -0.1 is not"),
    ],
)
def test_unusable_scores_are_refused(scores, message):
    class Bad:
        def score(self, prompts, responses):
            return scores

    with pytest.raises(VerifierError, match=message):
        checked_scores(Bad(), ["q", "q"], ["a", "b"])


def test_the_threshold_keeps_what_is_right():
    scores = [i / 200 for i in range(200)]
    correct = [i >= 100 for i in range(200)]
    threshold = calibrate(scores, correct, precision=0.95)
    chosen = [ok for s, ok in zip(scores, correct, strict=True) if s >= threshold]
    assert 0.4 < threshold <= 0.5 and sum(chosen) / len(chosen) >= 0.95
    assert calibrate([0.7] * 100, [True] * 100) == 0.7
    with pytest.raises(ValueError, match=r"no threshold reaches a precision of 95%: at 0.7, which selects 100 of 100"):
        calibrate([0.7] * 100, [True] * 50 + [False] * 50)
    with pytest.raises(ValueError, match="got 0 scores"):
        calibrate([], [])
    with pytest.raises(ValueError, match="not finite"):
        calibrate([float("nan")], [True])


# ---------------------------------------------------------------- training


def test_the_loss_covers_the_response_and_its_end():
    one = learner()
    ids, mask, labels = one._batch([("ab", Response("c", [99], True)), ("a", Response("cde", [99, 100, 101], False))])
    assert ids.tolist() == [[97, 98, 99, 256], [97, 99, 100, 101]]
    assert labels.tolist() == [[-100, -100, 99, 256], [-100, 99, 100, 101]] and mask.all()


@pytest.mark.parametrize("sharing", [None, "qk", "kv"])
@pytest.mark.parametrize("mode", ["transductive", "online"])
def test_it_makes_the_verifiers_choice_more_likely(sharing, mode, tmp_path):
    one = learner(sharing=sharing, mode=mode, online_steps=3, run=tmp_path / "run")
    base = {name: p.clone() for name, p in one.model.named_parameters()}

    def likelihood(m):
        lines = (tmp_path / "run" / "selected-0.jsonl").read_text().splitlines()
        pool = {r["query"]: r["responses"] for r in map(json.loads, (tmp_path / "run" / "pool-0.jsonl").open())}
        pairs = [(r["query"], Response(**pool[r["query"]][r["response"]])) for r in map(json.loads, lines)]
        ids, mask, labels = one._batch([(QUERIES[i], response) for i, response in pairs])
        with torch.no_grad():
            return -m.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss.item()

    adapted = one.adapt(QUERIES)
    assert one.selected[0] >= 3
    for name, p in adapted.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora" not in name:
            assert torch.equal(p, base[plain]), name  # LoRA alone is trained
    after = likelihood(adapted)
    with adapted.disable_adapter():
        before = likelihood(adapted)
    assert after > before + 0.05
    merged = adapted.merge_and_unload()
    assert likelihood(merged) == pytest.approx(after, abs=1e-3)


class Stop(Exception):
    pass


def interrupted(where, count):
    """A listener that stops the run at the count-th report of a phase, as Ctrl-C would."""
    seen = []

    def listener(phase, done, total):
        if phase == where:
            seen.append(done)
            if len(seen) == count:
                raise Stop

    return listener


@pytest.mark.parametrize(
    "options, where, count",
    [
        ({}, "drawing", 2),
        ({}, "drawing", 3),
        ({}, "judging", 2),
        ({}, "training", 3),
        ({"iterations": 2}, "drawing", 5),
        ({"iterations": 2}, "training", 8),
        ({"mode": "online"}, "adapting", 1),
        ({"mode": "online"}, "adapting", 5),
        ({"mode": "online", "iterations": 2}, "adapting", 9),
    ],
    ids=str,
)
def test_interrupted_and_resumed_equals_uninterrupted(options, where, count, tmp_path):
    whole = learner(run=tmp_path / "whole", **options)
    want = weights(whole.adapt(QUERIES))
    with pytest.raises(Stop):
        learner(run=tmp_path / "parts", listener=interrupted(where, count), **options).adapt(QUERIES)
    verifier = Likes()
    resumed = learner(verifier, run=tmp_path / "parts", **options)
    assert torch.equal(weights(resumed.adapt(QUERIES)), want)
    assert resumed.selected == whole.selected
    for name in ("pool-0.jsonl", "scores-0.jsonl", "selected-0.jsonl"):
        one, other = (
            {r["query"]: r for r in map(json.loads, (tmp_path / d / name).open())} for d in ("whole", "parts")
        )
        assert one == other
    if where != "drawing":
        assert verifier.asked < whole.verifier.asked  # what was judged is not judged again
    # A finished run is not run again.
    again = learner(Likes(), run=tmp_path / "parts", **options)
    assert torch.equal(weights(again.adapt(QUERIES)), want) and again.verifier.asked == 0


@pytest.mark.parametrize("mode", ["transductive", "online"])
def test_what_comes_back_is_ready_to_answer(mode, tmp_path):
    """No dropout, from a run folder either; torch's generator and what was counted are as if there had been no other call."""
    ids = torch.tensor([byte_tokenizer()(QUERIES[0])["input_ids"]])
    one = learner(mode=mode, run=tmp_path, lora=LoraSettings(rank=4, alpha=8, dropout=0.5))
    state = torch.get_rng_state()
    want = one.adapt(QUERIES)
    assert torch.equal(torch.get_rng_state(), state)
    again = learner(mode=mode, run=tmp_path, lora=LoraSettings(rank=4, alpha=8, dropout=0.5)).adapt(QUERIES)
    assert not any(module.training for module in again.modules())
    assert torch.equal(again(ids).logits, want(ids).logits)


def test_a_second_call_begins_from_the_model_without_adapters():
    fresh = learner()
    want = weights(fresh.adapt(QUERIES[3:]))
    both = learner()
    both.adapt(QUERIES[:3])
    assert torch.equal(weights(both.adapt(QUERIES[3:])), want) and both.selected == fresh.selected


@pytest.mark.parametrize("own", [False, True], ids=["plain", "adapters of its own"])
@pytest.mark.parametrize("where", ["drawing", "judging", "training"])
def test_a_call_that_fails_leaves_the_model_as_it_was(own, where):
    one = learner(listener=interrupted(where, 2))
    if own:
        one.model = get_peft_model(one.model, LoraConfig(target_modules=["q_proj"]))
    one.model.train().get_submodule("model.layers.0" if not own else "base_model.model.model.layers.0").eval()
    before = [(n, p.detach().clone(), p.requires_grad) for n, p in one.model.named_parameters()]
    modes = [module.training for module in one.model.modules()]
    with pytest.raises(Stop):
        one.adapt(QUERIES)
    after = list(one.model.named_parameters())
    assert [(n, p.requires_grad) for n, p in after] == [(n, wanted) for n, _, wanted in before]
    assert all(torch.equal(p, held) for (_, p), (_, held, _) in zip(after, before, strict=True))
    assert [module.training for module in one.model.modules()] == modes
    assert all(p.grad is None for _, p in after)


def test_nothing_above_the_threshold_changes_nothing(tmp_path):
    for mode in ("transductive", "online"):
        one = learner(Likes(at_most=0.1), mode=mode, run=tmp_path / mode)
        with pytest.warns(UserWarning, match=r"no response reached the threshold 0.2; the model is unchanged"):
            assert one.adapt(QUERIES) is one.model
        assert one.selected == [0] and not any("lora" in name for name, _ in one.model.named_parameters())
        assert len((tmp_path / mode / "scores-0.jsonl").read_text().splitlines()) == 6


def test_a_bad_verifier_loses_nothing(tmp_path):
    class Broken(Likes):
        def score(self, prompts, responses):
            return [float("nan")] * len(responses) if self.asked >= 8 else super().score(prompts, responses)

    with pytest.raises(VerifierError, match="score nan"):
        learner(Broken(), run=tmp_path).adapt(QUERIES)
    assert len((tmp_path / "pool-0.jsonl").read_text().splitlines()) == 6
    verifier = Likes()
    learner(verifier, run=tmp_path).adapt(QUERIES)
    assert verifier.asked == 4 * 4  # the first two queries were judged before


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    import errno

    from effcore.methods import vds_run

    one, written = learner(run=tmp_path), []
    original = vds_run.Journal.add

    def add(self, row):
        if len(written) == 3:
            with self.path.open("a") as file:
                file.write(json.dumps(row)[:20])  # what fits
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        written.append(row)
        original(self, row)

    monkeypatch.setattr(vds_run.Journal, "add", add)
    with pytest.raises(OSError, match="No space left"):
        one.adapt(QUERIES)
    monkeypatch.undo()
    got = weights(learner(run=tmp_path).adapt(QUERIES))
    assert torch.equal(got, weights(learner().adapt(QUERIES)))


def test_a_folder_of_another_run_is_refused(tmp_path):
    learner(run=tmp_path / "run").adapt(QUERIES)
    with pytest.raises(InputError, match=r"a run with other settings is here \(threshold differ\)"):
        learner(run=tmp_path / "run", threshold=0.4).adapt(QUERIES)
    with pytest.raises(InputError, match=r"\(queries differ\)"):
        learner(run=tmp_path / "run").adapt(QUERIES[:3])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json.partial").write_text("{")  # killed, or a full disk
    assert learner(run=tmp_path / "begun").adapt(QUERIES)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="holds no run"):
        learner(run=tmp_path / "other").adapt(QUERIES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples must be positive, got 0"),
        ({"threshold": 1.1}, "threshold must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"mode": "both"}, "mode must be transductive or online"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"iterations": 0}, "iterations must be positive"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        learner(**options)


def test_no_queries_and_no_modules():
    with pytest.raises(ValueError, match="the list of queries is empty"):
        learner().adapt([])
    with pytest.raises(ValueError, match="has none of the modules nowhere"):
        learner(lora=LoraSettings(modules=("nowhere",))).adapt(QUERIES)


def test_the_report():
    one = learner()
    row = measure(one, one.model, QUERIES, lambda i, text: len(text) % 2 == 0, lambda text: text[:1])
    assert row["oracle"] >= row["best_of_n"] and all(0 <= row[c] <= 1 for c in ("greedy", "majority"))
    assert "| base |" in table({"base": row})
