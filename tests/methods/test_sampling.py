"""One reading of a prompt for many samples: the samples of generate(), on models of transformers and on ours."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import effcore
from effcore.data import byte_tokenizer
from effcore.errors import RunError
from effcore.methods.sampling import sample_texts, sample_tokens


def model(sharing=None):
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=256,
            pad_token_id=257,
            initializer_range=0.3,
        )
    )
    made = made if sharing is None else effcore.share_activations(made, mode=sharing, start=2)
    return made.double().eval()


def padded():
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 7)):
        ids[row, :pad], mask[row, :pad] = 257, 0
    return ids, mask


@pytest.mark.parametrize("sharing", [None, "qk", "kv"])
@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"top_p": 0.9}, {"do_sample": False}], ids=str)
def test_the_samples_are_those_of_generate(sharing, options):
    m, (ids, mask) = model(sharing), padded()
    torch.manual_seed(7)
    want = (
        m.generate(
            ids, attention_mask=mask, num_return_sequences=3, max_new_tokens=12, **({"do_sample": True} | options)
        )
        if options.get("do_sample", True)
        else m.generate(
            ids.repeat_interleave(3, 0), attention_mask=mask.repeat_interleave(3, 0), max_new_tokens=12, **options
        )
    )
    got = sample_tokens(m, ids, mask, num_samples=3, max_new_tokens=12, seed=7, **options)
    assert got.shape[:2] == (3, 3)
    assert torch.equal(got.flatten(0, 1), want[:, 9:])


def test_the_prompts_are_read_once():
    m, (ids, mask) = model(), padded()
    read = []
    m.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    sample_tokens(m, ids, mask, num_samples=5, max_new_tokens=4)
    assert read[0] == (3, 8) and all(shape == (15, 1) for shape in read[1:])


def test_the_generator_is_left_alone_and_the_mode_too():
    m, (ids, mask) = model().train(), padded()
    before = torch.get_rng_state()
    sample_tokens(m, ids, mask, num_samples=2, max_new_tokens=3, seed=3)
    assert torch.equal(torch.get_rng_state(), before) and m.training


def test_each_module_keeps_its_mode():
    net, (ids, mask) = model().train(), padded()
    net.model.layers[0].eval()
    sample_tokens(net, ids, mask, num_samples=2, max_new_tokens=2)
    assert net.training and net.model.layers[1].training and not net.model.layers[0].training


def test_without_a_cache():
    net, (ids, mask) = model(), padded()
    want = sample_tokens(net, ids, mask, num_samples=2, max_new_tokens=4, seed=0)
    net.generation_config.use_cache = False
    assert torch.equal(sample_tokens(net, ids, mask, num_samples=2, max_new_tokens=4, seed=0), want)


def test_prompts_of_one_token_and_single_samples():
    m = model()
    assert sample_tokens(m, torch.tensor([[5], [6]]), num_samples=3, max_new_tokens=4).shape[:2] == (2, 3)
    assert sample_tokens(m, *padded(), num_samples=1, max_new_tokens=4).shape[:2] == (3, 1)


def test_texts_come_back_in_their_order():
    m, tokenizer = model(), byte_tokenizer()
    prompts = ["a long prompt with many bytes", "b", "middle one"]
    texts = sample_texts(m, tokenizer, prompts, num_samples=2, max_new_tokens=5, batch_size=2, do_sample=False)
    for prompt, (one, other) in zip(prompts, texts, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        want = m.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
        want = want[: want.index(256)] if 256 in want else want
        assert one == other == tokenizer.decode(want, skip_special_tokens=True)


def test_logits_that_are_not_numbers_are_an_error():
    m, (ids, mask) = model(), padded()
    m.lm_head.weight.data[0] = torch.nan
    for options in ({}, {"do_sample": False}):
        with pytest.raises(RunError, match="logits hold NaN"):
            sample_tokens(m, ids, mask, num_samples=2, max_new_tokens=2, **options)


def test_bad_arguments():
    m, (ids, mask) = model(), padded()
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        sample_tokens(m, ids, mask, num_samples=0, max_new_tokens=3)
    with pytest.raises(ValueError, match="padded on the left"):
        sample_tokens(m, ids, mask.flip(1), num_samples=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        sample_texts(m, byte_tokenizer(), [""], num_samples=2, max_new_tokens=3)
