"""What the claims of SkipViT are made of: embedding by a product, merging, and an accuracy run that writes its results."""

import json

import pytest
import torch
from torch import nn

from benchmarks.claims import _skipvit_accuracy, _skipvit_profile, skipvit
from benchmarks.claims._skipvit_speed import embed_as


@pytest.mark.parametrize("bias", [True, False])
def test_embedding_as_a_product(bias):
    model = nn.Sequential(nn.Conv2d(3, 10, (4, 2), (4, 2), bias=bias)).double()
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    expected = model(x)
    product = embed_as(model, "product")(x)
    assert type(model[0]) is not nn.Conv2d
    torch.testing.assert_close(product, expected)
    assert embed_as(model, "convolution")(x).equal(expected) and type(model[0]) is nn.Conv2d


def test_merging_keeps_the_class_token_and_the_mean():
    x = torch.randn(2, 1 + 64, 8, dtype=torch.float64)
    x[:, 2] = x[:, 1]  # the most alike: they become one, the same
    assert _skipvit_accuracy.merge_most_alike(x, 10).shape == (2, 1 + 32, 8)  # half at most
    merged = _skipvit_accuracy.merge_most_alike(x, 63)
    assert merged.shape == (2, 1 + 63, 8)
    assert merged[:, 0].equal(x[:, 0])
    torch.testing.assert_close(merged.sum(1) + x[:, 1], x.sum(1))
    assert _skipvit_accuracy.merge_most_alike(x, 64).sort(1).values.equal(x.sort(1).values)


def test_kernels_by_kind():
    taken = [
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_bias_TNN", 48, 3530.0),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 12, 1030.0),
        ("triton_poi_fused_gelu_view_3", 12, 1320.0),
        ("triton_per_fused_add_convolution_native_layer_norm_view_8", 5, 316.0),
        ("void effcore::cuda::routing::partition_kernel", 1, 21.0),
        ("Memset (Device)", 61, 49.0),
    ]
    spent = _skipvit_profile.summarise(taken)
    assert spent["launches"] == 139 and sum(spent.values()) - 139 == sum(us for *_, us in taken)
    kinds = ["matrix products", "attention", "GELU", "norms, additions, lookups", "scores and movement", "other"]
    assert [spent[kind] for kind in kinds] == [us for *_, us in taken] and spent["convolution"] == 0


@pytest.mark.slow
def test_accuracy(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(_skipvit_accuracy, "IMAGES", 50)
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    given = ["accuracy", "--source", "hf", "--device", "cpu", "--steps", 10, "--seeds", 2, "--batch", 4]
    assert skipvit.main([str(part) for part in [*given, "--json", out, "--picture", picture]]) == 0
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == list(_skipvit_accuracy.METHODS)
    assert all(len(row["runs"]) == 2 and 0 <= row["accuracy"] <= 1 for row in report["rows"])
    assert "accuracy_on_all_patches" in report["rows"][1] and "on all patches" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"
