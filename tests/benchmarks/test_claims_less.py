"""The claims of SwiftLearn, TTC-aware stopping and VDS-TTT run, and count what they say they count. No numbers are judged."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.claims import _adding, _sorting, swiftlearn, ttc, vds_ttt
from benchmarks.claims._sorting import is_right, problems
from benchmarks.claims._sorting_verifier import corrupted, judged
from benchmarks.claims._step import linear_decay


def test_the_task_is_checked_exactly():
    import random

    rows = problems(0, 50, (3, 8))
    assert all(is_right(prompt, answer) for prompt, answer in rows)
    assert sum(is_right(p, corrupted(random.Random(i), a)) for i, (p, a) in enumerate(rows)) < 10
    ids, labels = _sorting.draws({3: 0.5, 5: 0.5})(200, torch.Generator().manual_seed(0))
    assert ids.shape == (200, 12)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        prompt, answer = bytes(t for t in row if t < 256).decode().split("=")
        assert is_right(prompt + "=", answer) and len(answer) in (3, 5)
        n = len(answer)
        assert wanted == [-100] * (n + 1) + row[n + 1 : 2 * n + 2] + [-100] * (10 - 2 * n) and row[2 * n + 1] == 256
    ids, labels = _adding.draws({3: 0.5, 5: 0.5})(200, torch.Generator().manual_seed(0))
    orders = set()
    for row in ids.tolist():
        prompt, answer = bytes(t for t in row if t < 256).decode().split("=")
        taken, sums = answer[::2], answer[1::2]
        assert sorted(taken) == sorted(prompt) and len(prompt) in (3, 5)
        assert [int(s) for s in sums] == [sum(map(int, taken[: i + 1])) % 10 for i in range(len(taken))]
        assert _adding.is_right(prompt + "=", answer) and not _adding.is_right(prompt + "=", answer[:-1] + "x")
        orders.add(taken == prompt)
    assert orders == {True, False} and (labels >= 0).sum() == (ids[labels >= 0] < 257).sum()
    ids, labels = judged([("ba=", "ab"), ("ba=", "aa"), ("ba=", "abb"), ("ba=", "")], 8)
    assert ids[0].tolist() == [98, 97, 61, 97, 98, 10, 257, 257]
    assert labels[:, 3:].tolist() == [
        [1, 1, 1, -100, -100],
        [1, 0, 0, -100, -100],
        [1, 1, 0, 0, -100],
        [0] + [-100] * 4,
    ]
    assert linear_decay(0, 100, peak=1.0) == pytest.approx(0.2) and linear_decay(99, 100, peak=1.0) == pytest.approx(
        1 / 95
    )


@pytest.mark.slow
def test_swiftlearn(tmp_path, capsys):
    BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(tmp_path / "encoder")
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array(["a", "b"])}
    for split, count in (("train", 200), ("validation", 40), ("test", 40)):
        arrays[f"{split}_ids"] = rng.integers(1, 50, (count, 6)).astype(np.uint16)
        arrays[f"{split}_labels"] = (arrays[f"{split}_ids"][:, 0] > 25).astype(np.uint8)
    np.savez(tmp_path / "tokens.npz", **arrays)
    out = tmp_path / "r.json"
    given = ["--device", "cpu", "--model", tmp_path / "encoder", "--tokens", tmp_path / "tokens.npz", "--json", out]
    given += [
        "--batch",
        16,
        "--epochs",
        5,
        "--seeds",
        0,
        1,
        "--tune",
        7,
        "--peaks",
        1e-3,
        1e-2,
        "--full-peaks",
        1e-3,
        1e-2,
        "--arms",
        *swiftlearn.ARMS,
    ]
    assert swiftlearn.main([str(part) for part in given]) == 0
    result = json.loads(out.read_text())
    steps = {row["arm"]: row["steps"] for row in result["runs"]}
    short = 2 * 10 + 3 * 1  # 160 samples are whole batches
    assert steps == {arm: 5 * 10 if arm == "all data" else short for arm in swiftlearn.ARMS}
    trials = [row for row in result["runs"] if row["seed"] == 7]
    assert len(trials) == 2 * len(swiftlearn.ARMS) and not any("test" in row for row in trials)
    for arm, peaks in result["trials"].items():
        best = max(peaks, key=peaks.get)
        assert {(row["peak"], row["seed"]) for row in result["runs"] if row["arm"] == arm and "test" in row} == {
            (float(best), 0),
            (float(best), 1),
        }
    assert "| the paper" in capsys.readouterr().out and out.with_suffix(".png").is_file()
    assert swiftlearn.main([str(part) for part in given]) == 0  # nothing is run again
    assert json.loads(out.read_text())["runs"] == result["runs"]
    timed = [*given, "--time", "--tune", "--arms", *swiftlearn.TIMED]
    assert swiftlearn.main([str(part) for part in timed]) == 0
    result = json.loads(out.read_text())
    assert result["speed"]["rounds"] == 2 and result["speed"]["speedup"] > 0
    for row in result["runs"]:
        if row["alone"]:  # from beginning to end comes to the same as behind a warm-up that was shared
            key = ("arm", "peak", "seed", "steps", "validation", "test")
            assert any(all(row[k] == other.get(k) for k in key) for other in result["runs"] if not other["alone"])


@pytest.mark.slow
def test_selection_ttc_and_vds(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert swiftlearn.main(["--selection", "--quick", "--json", str(tmp_path / "s.json")]) == 0
        for name in ttc.TASKS:
            out = tmp_path / f"{name}.json"
            assert ttc.main(["--quick", "--device", "cpu", "--task", name, "--json", str(out)]) == 0
            assert out.with_suffix(".png").is_file()
            (row,) = json.loads(out.read_text())["runs"]
            assert not row["stopped"] and row["saved"] == 0 and len(row["decisions"]) == 6
        monkeypatch.setattr(vds_ttt, "calibrate", lambda *_, **__: 0.0)
        parts = []
        for seed in ("0", "1"):
            parts.append(str(tmp_path / f"v{seed}.json"))
            given = ["--quick", "--device", "cpu", "--seeds", seed, "--json", parts[-1]]
            assert vds_ttt.main(given) == 0
        assert vds_ttt.main(["--device", "cpu", "--merge", *parts, "--json", str(tmp_path / "v.json")]) == 0
        runs = json.loads((tmp_path / "v.json").read_text())["runs"]
        assert [run["seed"] for run in runs] == [0, 1] and [run["selected"] for run in runs] == [[16], [16]]
    finally:
        torch.set_num_threads(threads)
