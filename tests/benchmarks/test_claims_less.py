"""The claims of SwiftLearn, TTC-aware stopping and VDS-TTT run, and count what they say they count. No numbers are judged."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.claims import swiftlearn, ttc, vds_ttt
from benchmarks.claims._sorting import corrupted, encode, is_right, problems
from benchmarks.claims._step import linear_decay


def test_the_task_is_checked_exactly():
    import random

    rows = problems(0, 50, (3, 8))
    assert all(is_right(prompt, answer) for prompt, answer in rows)
    assert sum(is_right(p, corrupted(random.Random(i), a)) for i, (p, a) in enumerate(rows)) < 10
    ids, labels = encode([("ba=", "ab")])
    assert ids[0, :6].tolist() == [98, 97, 61, 97, 98, 256] and labels[0, :6].tolist() == [-100] * 3 + [97, 98, 256]
    assert linear_decay(0, 100, peak=1.0) == pytest.approx(0.2) and linear_decay(99, 100, peak=1.0) == pytest.approx(
        1 / 95
    )


@pytest.mark.slow
def test_swiftlearn(tmp_path, capsys):
    BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path / "encoder")
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array(["a", "b"])}
    for split, count in (("train", 200), ("validation", 40), ("test", 40)):
        arrays[f"{split}_ids"] = rng.integers(1, 50, (count, 6)).astype(np.uint16)
        arrays[f"{split}_labels"] = (arrays[f"{split}_ids"][:, 0] > 25).astype(np.uint8)
    np.savez(tmp_path / "tokens.npz", **arrays)
    out = tmp_path / "r.json"
    given = ["--device", "cpu", "--model", tmp_path / "encoder", "--tokens", tmp_path / "tokens.npz", "--json", out]
    given += ["--batch", 16, "--epochs", 5, "--seeds", 2, "--peaks", 1e-3, 1e-2]
    assert swiftlearn.main([str(part) for part in given]) == 0
    result = json.loads(out.read_text())
    steps = {row["arm"]: row["steps"] for row in result["runs"]}
    short = 2 * 13 + 3 * 2
    assert steps == {arm: 5 * 13 if arm == "all data" else short for arm in swiftlearn.ARMS}
    assert len(result["runs"]) == 10 and "| ceiling" in capsys.readouterr().out and out.with_suffix(".png").is_file()


@pytest.mark.slow
def test_selection_ttc_and_vds(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert swiftlearn.main(["--selection", "--quick", "--json", str(tmp_path / "s.json")]) == 0
        for metric in ("majority", "verifier"):
            out = tmp_path / f"{metric}.json"
            assert ttc.main(["--quick", "--device", "cpu", "--metric", metric, "--json", str(out)]) == 0
            assert out.with_suffix(".png").is_file()
            (row,) = json.loads(out.read_text())["runs"]
            assert (row["verifier_training_share"] > 0) == (metric == "verifier") and not row["stopped"]
        given = ["--quick", "--device", "cpu", "--threshold", "0", "--json", str(tmp_path / "v.json")]
        assert vds_ttt.main(given) == 0
        assert json.loads((tmp_path / "v.json").read_text())["runs"][0]["selected"] == [16]
    finally:
        torch.set_num_threads(threads)
