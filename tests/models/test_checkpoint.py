"""Saving and loading: own checkpoints, folders of transformers' models, fused projections, broken files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from effcore.models import SharedLlamaConfig, SharedLlamaForCausalLM
from effcore.models.checkpoint import split_fused
from tests.models.tiny import FAMILIES, SHARINGS, hf_model, shared_model, tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_round_trip(sharing, family, tmp_path):
    model, ids = shared_model(sharing, family), tokens()
    model.save_pretrained(tmp_path)
    for cls in (SharedLlamaForCausalLM, AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is SharedLlamaForCausalLM
        assert (loaded.layout, loaded.config.share_mode, loaded.config.share_owner) == (
            model.layout,
            model.config.share_mode,
            model.config.share_owner,
        )
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SharedLlamaConfig) and config.share_layout == str(model.layout)


def test_the_layout_in_force_is_saved(tmp_path):
    model = shared_model("qk")
    model.set_layout(4)
    model.save_pretrained(tmp_path)
    assert str(SharedLlamaForCausalLM.from_pretrained(tmp_path).layout) == "0_1_2_3_3"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_folders_load_with_nothing_shared(family, tmp_path):
    original, ids = hf_model(family), tokens()
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = SharedLlamaForCausalLM.from_pretrained(tmp_path)
    assert model.layout.is_full and not model.training
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    half = SharedLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("shards", [False, True])
def test_fused_projections_are_split(shards, tmp_path):
    original, ids = hf_model("llama-mha-bias"), tokens()
    original.generation_config.eos_token_id = [7, 8]
    original.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for i in range(5):
        for kind in ("weight", "bias"):
            at = f"model.layers.{i}."
            qkv = [state.pop(f"{at}self_attn.{n}_proj.{kind}") for n in "qkv"]
            state[f"{at}self_attn.qkv_proj.{kind}"] = torch.cat(qkv)
            mlp = [state.pop(f"{at}mlp.{n}_proj.{kind}") for n in ("gate", "up")]
            state[f"{at}mlp.gate_up_proj.{kind}"] = torch.cat(mlp)
    if shards:
        (tmp_path / "model.safetensors").unlink()
        names = sorted(state)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({n: state[n] for n in part}, tmp_path / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: f for f, part in halves.items() for n in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = SharedLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.generation_config.eos_token_id == [7, 8] and model.name_or_path == str(tmp_path)
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"qkv_proj.weight must have 48 \+ 48 \+ 48 rows, got 7"):
        split_fused({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(7, 48)}, model.config)


def test_from_scratch_and_bad_configurations():
    config = hf_model().config
    SharedLlamaConfig.from_hf(config, share_mode="kv", share_owner="projection", share_layout="0_1_2_2_2")
    for options, message in (
        ({"share_mode": "x"}, "share_mode must be 'qk' or 'kv', got 'x'"),
        ({"share_owner": "x"}, "share_owner must be 'layer' or 'projection', got 'x'"),
        ({"share_owner": "projection"}, "needs share_mode='kv'"),
        ({"share_layout": "0_2_2_2_2"}, "points forward"),
        ({"share_layout": "0_1"}, "2 layers but the model has 5"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"num_key_value_heads": 3}, "4 query heads are not a multiple of 3 kv heads"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 of 5 layers"),
    ):
        with pytest.raises(Exception, match=message):
            SharedLlamaConfig.from_hf(config, **options)


def test_bad_folders(tmp_path):
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        SharedLlamaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'llama', 'mistral', 'qwen2' and 'qwen3' can be converted, got 'gpt2'"):
        SharedLlamaForCausalLM.from_pretrained(tmp_path)
