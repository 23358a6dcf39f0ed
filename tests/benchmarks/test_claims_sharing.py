"""What the claims on shared activations measure against: a baseline in one graph without a mask, and a control."""

import copy
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.claims import _epas_profile as profiles
from benchmarks.claims import _sharing as sharing


def test_the_baseline_is_one_graph_and_makes_no_mask():
    model = sharing.llama(32, quick=True, length=64)
    ids = torch.randint(0, model.config.vocab_size, (2, 64))
    exact = model(input_ids=ids, labels=ids, use_cache=False).loss
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("causal_sdpa_0")
    counter = CompileCounterWithBackend("eager")
    loss = torch.compile(twin, fullgraph=True, backend=counter)(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, exact)
    assert counter.frame_count == 1
    attention = [
        node
        for node in counter.graphs[0].graph.nodes
        if node.target is torch.nn.functional.scaled_dot_product_attention
    ]
    assert len(attention) == model.config.num_hidden_layers
    assert all(node.kwargs["is_causal"] and node.kwargs["attn_mask"] is None for node in attention)


def test_rows_compare_round_by_round_with_the_best_baseline_and_the_control(capsys):
    times = {"a": [2.0, 4.0], "b": [3.0, 6.0], sharing.CONTROL: [1.0, 2.0], "ours": [0.5, 1.0]}
    rows = {row["model"]: row for row in sharing.rows_of(times, ["a", "b"], 6.0, "tokens/s")}
    assert rows["ours"]["against"] == "a" and rows["ours"]["ratio"] == 4.0 and rows["ours"]["ratio_to_control"] == 2.0
    assert rows["b"]["ratio"] == pytest.approx(2 / 3) and "ratio_to_control" not in rows["a"]
    assert "2.000x nothing shared" in capsys.readouterr().out


def test_a_report_is_on_disk_after_every_row(tmp_path):
    report = sharing.Report(tmp_path / "results" / "r.json", "some claim")
    report.add([{"model": "a"}])
    assert [row["model"] for row in json.loads(report.path.read_text())["rows"]] == ["a"]
    report.add([{"model": "b"}])
    written = json.loads(report.path.read_text())
    assert [row["model"] for row in written["rows"]] == ["a", "b"] and written["claim"] == "some claim"


@pytest.mark.parametrize("layers,fraction,first", [(22, 2 / 3, 7), (22, 1 / 2, 11), (4, 1.0, 1)])
def test_shared_from(layers, fraction, first):
    assert sharing.shared_from(layers, fraction) == first
    assert sharing.nothing_shared(3) == "0_1_2"


def test_a_profile_sums_kernels_by_kind_and_counts_the_time_between_them():
    kernels = [  # two steps; the optimizer's kernel overlaps the copy
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 0.0, 10.0),
        ("triton_poi_fused_add_cat_mul_0", 12.0, 16.0),
        ("void effcore::cuda::attention::decode_kernel<cutlass::bfloat16_t>", 16.0, 20.0),
        ("nvjet_tst_128x256", 30.0, 40.0),
        ("void at::native::multi_tensor_apply_kernel<fused_adam>", 40.0, 50.0),
        ("Memcpy DtoD", 44.0, 46.0),
        ("nvjet_tst_128x256", 51.0, 53.0),
    ]
    found = profiles.summarise(reversed(kernels), steps=2)
    assert found["kinds"] == {
        "attention": 7.0,
        "optimizer": 5.0,
        "matrix products": 6.0,
        "cache writes": 0.0,
        "fused by the compiler": 2.0,
        "other": 1.0,
    }
    assert found["idle"] == (2 + 10 + 1) / 2
    assert found["kernels"]["nvjet_tst_128x256"] == {"microseconds": 6.0, "launches": 1.0}
    text = profiles.describe("a step", found)
    assert "a step: 28 us a step" in text and "idle" in text
