"""share_activations: in place, with the same parameters; what it refuses; dropping projections."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import effcore
from effcore import share_activations
from effcore.models import Layout, SharedLlamaForCausalLM
from tests.models.tiny import FAMILIES, SHARINGS, hf_model, oracle_logits, shared_model, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_shared_equals_transformers(family):
    original, ids = hf_model(family), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for mode in ("qk", "kv"):
        model = share_activations(original, mode=mode, shared=0, inplace=False)
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), original.generate(ids, **options))
        # Left padding: transformers takes positions from the mask in generate().
        padded = {"attention_mask": mask, **options}
        assert torch.equal(model.generate(ids, **padded), original.generate(ids, **padded))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_in_place(sharing, family):
    mode, owner, layout = SHARINGS[sharing]
    model = hf_model(family)
    parameters, keys = dict(model.named_parameters()), set(model.state_dict())
    inner = model.model
    converted = effcore.share_activations(model, mode=mode, owner=owner, layout=layout)
    assert converted is model and isinstance(model, SharedLlamaForCausalLM) and model.model is inner
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in parameters.items())
    assert {n for n in after if n not in parameters} == {n for n in after if "kv_projections" in n}
    assert keys <= set(model.state_dict())
    if FAMILIES[family][2].get("tie_word_embeddings"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and model.config.architectures == ["SharedLlamaForCausalLM"]


def test_a_copy_leaves_the_model_alone():
    model, ids = hf_model(), tokens()
    before, kind = model(ids).logits, type(model)
    copy = share_activations(model, start=3, inplace=False)
    assert type(model) is kind and type(copy) is SharedLlamaForCausalLM
    assert all(a is not b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_a_layout_in_every_form():
    for form in ({"start": 3}, {"shared": 2}, {"layout": "0_1_2_2_2"}, {"layout": Layout.from_start(5, 3)}):
        assert str(share_activations(hf_model(), **form).layout) == "0_1_2_2_2"


def test_converting_again_changes_mode_and_layout():
    model, ids = hf_model(), tokens()
    share_activations(model, mode="qk", start=3)
    assert share_activations(model, mode="kv", start=2) is model
    torch.testing.assert_close(model(ids).logits, oracle_logits(model, ids), rtol=1e-4, atol=1e-4)
    share_activations(model, mode="kv", start=3, owner="projection")
    torch.testing.assert_close(model(ids).logits, oracle_logits(model, ids), rtol=1e-4, atol=1e-4)
    share_activations(model, mode="qk", shared=0)
    assert not model.model.kv_projections
    torch.testing.assert_close(model(ids).logits, hf_model()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_refused_conversion_changes_nothing(sharing):
    model = hf_model()
    kind, config = type(model), model.config
    for bad in (
        {"start": 0},
        {"start": 9},
        {"layout": "0_1_2"},
        {"mode": "vq", "start": 1},
        {"owner": "x", "start": 1},
    ):
        with pytest.raises(ValueError, match="effcore"):
            share_activations(model, **bad)
    assert type(model) is kind and model.config is config
    shared = shared_model(sharing)
    before = str(shared.config)
    with pytest.raises(ValueError, match="points forward"):
        shared.set_layout("0_2_2_2_2")
    assert str(shared.config) == before and str(shared.layout) == SHARINGS[sharing][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of start, layout and shared, got none"),
        ({"start": 3, "shared": 2}, "got start and shared"),
        ({"start": 0}, "start must be from 1 to 5, got 0"),
        ({"layout": "0_1"}, "2 layers but the model has 5"),
        ({"mode": "both", "start": 3}, "mode must be 'qk' or 'kv', got 'both'"),
        ({"owner": "yoco", "mode": "kv", "start": 3}, "owner must be 'layer' or 'projection', got 'yoco'"),
        ({"owner": "projection", "start": 3}, "needs mode='kv'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        share_activations(hf_model(), **options)


def test_unsupported_models_are_refused_by_name():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(TypeError, match=r"LlamaForCausalLM, MistralForCausalLM.*got GPT2LMHeadModel"):
        share_activations(gpt2, start=1)
    with pytest.raises(TypeError, match="got Linear"):
        share_activations(nn.Linear(2, 2), start=1)
    with pytest.raises(TypeError, match=r"got LlamaModel"):
        share_activations(hf_model().model, start=1)
    with pytest.raises(TypeError, match=r"got OptimizedModule; convert the model first"):
        share_activations(torch.compile(hf_model()), start=1)
    for option, value in (("attention_dropout", 0.1), ("pretraining_tp", 2)):
        with pytest.raises(ValueError, match=f"{option}={value}"):
            share_activations(hf_model(**{option: value}), start=1)
    model = hf_model()
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=30\.0"):
        share_activations(model, start=1)
    model = hf_model()
    model.model.layers[1].forward = model.model.layers[1].forward
    with pytest.raises(TypeError, match=r"the forward of 'model.layers.1' was replaced"):
        share_activations(model, start=1)


def test_scores_are_not_shared_across_window_types():
    with pytest.raises(ValueError, match=r"layer 2 \(sliding_attention\) cannot use the scores of layer 1 \(full"):
        share_activations(hf_model("qwen2-windows"), mode="qk", start=2)
    model, ids = share_activations(hf_model("qwen2-windows"), mode="kv", start=2), tokens()
    torch.testing.assert_close(model(ids).logits, oracle_logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_dropping_unused_projections(sharing, tmp_path):
    model, ids = shared_model(sharing, "qwen3"), tokens()
    before, off = model(ids).logits, {n for n, _ in model.switched_off_parameters()}
    keys = set(model.state_dict())
    model.drop_unused_projections()
    assert set(model.state_dict()) == keys - off and not model.switched_off_parameters()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded, report = SharedLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert set(loaded.state_dict()) == keys - off
    torch.testing.assert_close(loaded(ids).logits, before, rtol=0, atol=0)
    for m in (model, loaded):
        with pytest.raises(ValueError, match="its projections were dropped"):
            m.set_layout(5)
        m.drop_unused_projections()
    with pytest.raises(ValueError, match="projections were dropped"):
        share_activations(model, mode="kv" if model.config.share_mode == "qk" else "qk", start=3)


def test_projections_start_as_the_first_consumers_own():
    """owner="projection" with one consumer computes what the unconverted model computes."""
    model, ids = hf_model("qwen3"), tokens()
    want = model(ids).logits
    share_activations(model, mode="kv", owner="projection", start=4)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert not any("kv_projections" in n for n, _ in model.switched_off_parameters())
    model.add_kv_projections(3)
    assert sum("kv_projections.2" in n for n, _ in model.switched_off_parameters()) == 4
    model.set_layout(3)
    torch.testing.assert_close(model(ids).logits, oracle_logits(model, ids), rtol=1e-4, atol=1e-4)
