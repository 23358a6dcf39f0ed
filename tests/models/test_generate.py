"""generate(): every form of decoding gives what recomputing the whole sequence gives."""

import pytest
import torch

from effcore.models import SharedCache
from tests.models.tiny import SHARINGS, shared_model, tokens

GREEDY = {"max_new_tokens": 10, "do_sample": False}


def padded():
    ids, mask = tokens(), torch.ones(2, 13, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_greedy(sharing, family):
    model, batch = shared_model(sharing, family), padded()
    want = model.generate(**batch, **GREEDY, use_cache=False)
    for options in (
        {},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"past_key_values": SharedCache(model.config)},
        {"past_key_values": SharedCache(model.config, max_cache_len=40)},
    ):
        assert torch.equal(model.generate(**batch, **GREEDY, **options), want), options
    # The padded row continues as it does alone.
    alone = model.generate(batch["input_ids"][:1, 5:], **GREEDY)
    assert torch.equal(alone[0, 8:], want[0, 13:])
    # By hand: argmax of the whole sequence, again and again.
    ids = batch["input_ids"][1:]
    for _ in range(10):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, want[1:])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_beams(sharing):
    model, batch = shared_model(sharing), padded()
    beams = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
    want = model.generate(**batch, **beams, use_cache=False)
    assert torch.equal(model.generate(**batch, **beams), want)
    assert torch.equal(model.generate(**batch, **beams, cache_implementation="static"), want)
    assert not torch.equal(want[::2], model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_sampling(sharing):
    model, batch = shared_model(sharing), padded()
    results = []
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        results.append(model.generate(**batch, max_new_tokens=10, do_sample=True, temperature=1.5, **options))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_assisted(sharing):
    """Candidates of an assistant are checked several at a time, and the cache is cropped where they were wrong."""
    model, ids = shared_model(sharing), tokens(1)
    want = model.generate(ids, **GREEDY)
    for assistant in (shared_model(sharing), shared_model("qk-blocks"), shared_model("kv", "mistral")):
        assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), want)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), want)
    with pytest.raises(ValueError, match="Static"):
        model.generate(ids, **GREEDY, assistant_model=shared_model("qk"), cache_implementation="static")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_conversation_continues_from_its_cache(sharing, static):
    model = shared_model(sharing)
    cache = SharedCache(model.config, max_cache_len=60 if static else None)
    ids = tokens(1, 5)
    for turn in range(3):
        ids = torch.cat([ids, tokens(1, 4, seed=turn)], 1)
        want = model.generate(ids, **GREEDY)
        ids = model.generate(ids, **GREEDY, past_key_values=cache)
        assert torch.equal(ids, want)


def test_region_length_is_chosen_per_call():
    model, ids = shared_model("qk"), tokens()
    results = {}
    for start in (3, 4, 5):
        with model.using_layout(start):
            results[start] = model.generate(ids, **GREEDY)
            assert torch.equal(results[start], model.generate(ids, **GREEDY, use_cache=False))
    assert str(model.layout) == "0_1_2_2_2"
    assert torch.equal(results[3], model.generate(ids, **GREEDY))
    assert not torch.equal(results[3], results[5])


def test_compiled_static_decoding():
    """A decoding step against a static cache is one graph, whatever the length."""
    for sharing in ("qk", "kv"):
        torch._dynamo.reset()
        model, batch = shared_model(sharing), padded()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        with torch.no_grad():
            cache = SharedCache(model.config, max_cache_len=24)
            model(**batch, past_key_values=cache)
            step = torch.compile(model.forward, backend=counter, fullgraph=True)
            ids, mask = tokens(2, 8, seed=9), torch.nn.functional.pad(batch["attention_mask"], (0, 11), value=1)
            got = [step(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits for i in range(8)]
            assert counter.frame_count == 1
            whole = torch.cat([batch["input_ids"], ids], 1)
            want = model(whole, attention_mask=mask[:, :21], use_cache=False).logits[:, 13:]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


def test_refused_by_name():
    model, ids = shared_model("qk"), tokens()
    for name in ("quantized", "offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match=f"cache_implementation must be 'dynamic' or 'static', got '{name}'"):
            model.generate(ids, **GREEDY, cache_implementation=name)
