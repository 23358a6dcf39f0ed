"""The cache: the same logits however a sequence is cut into passes; what it holds; beams, cropping, refusals."""

import pytest
import torch
from transformers import DynamicCache

from effcore.models import SharedCache, cache_bytes_per_token
from tests.models.tiny import SHARINGS, shared_model, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FAMILIES = ["llama", "mistral", "qwen3"]


def new_cache(model, static):
    return SharedCache(model.config, max_cache_len=20 if static else None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_use_cache_changes_nothing(sharing, family):
    model, ids = shared_model(sharing, family), tokens()
    torch.testing.assert_close(model(ids, use_cache=True).logits, model(ids, use_cache=False).logits, rtol=0, atol=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_any_cut_of_a_sequence(sharing, family, static):
    """One pass, chunks, and token by token; with and without left padding. RoPE positions continue where the cache ends."""
    model, ids = shared_model(sharing, family), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for attention_mask in (None, mask):
        want = model(ids, attention_mask=attention_mask, use_cache=False).logits
        for chunks in ([13], [1] * 13, [6, 7], [3, 1, 5, 4], [12, 1]):
            cache, got, end = new_cache(model, static), [], 0
            for part in ids.split(chunks, 1):
                end += part.shape[1]
                seen = None if attention_mask is None else attention_mask[:, :end]
                got.append(model(part, attention_mask=seen, past_key_values=cache).logits)
                assert int(cache.get_seq_length()) == end
            result = torch.cat(got, 1)
            if attention_mask is not None:  # what padding computes is nobody's business
                result, want = result[mask.bool()], want[mask.bool()] if want.dim() == 3 else want
            torch.testing.assert_close(result, want, **CLOSE)


@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_a_decoding_piece_writes_into_the_static_cache(sharing, monkeypatch):
    """Behind the first token K and V reach the buffers in the piece that makes them; compiled pieces give the same numbers."""
    torch._dynamo.reset()
    model, ids = shared_model(sharing), tokens()
    want = model(ids, use_cache=False).logits
    model.compile_pieces(backend="aot_eager")
    cache = new_cache(model, True)
    got = [model(ids[:, :1], past_key_values=cache).logits]
    append, appended = cache._append, []
    monkeypatch.setattr(cache, "_append", lambda layer, *a: (appended.append(layer), append(layer, *a))[1])
    got += [model(part, past_key_values=cache).logits for part in ids[:, 1:].split(1, 1)]
    torch.testing.assert_close(torch.cat(got, 1), want, **CLOSE)
    assert set(appended) <= ({2} if sharing == "kv-projection" else set())  # the K,V that are no layer's own


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_pass_with_a_cache_is_differentiable(sharing):
    model, ids = shared_model(sharing), tokens()
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    cached = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for n, p in model.named_parameters():
        assert (n in cached) == (p.grad is not None)
        if n in cached:
            torch.testing.assert_close(cached[n], p.grad, rtol=0, atol=0)
    assert not any(t.requires_grad for store in out.past_key_values.layers for t in store.buffers())
    with pytest.raises(RuntimeError, match=r"not differentiable; call the model under torch.no_grad"):
        model(ids[:, :1], past_key_values=out.past_key_values)
    with pytest.raises(RuntimeError, match="static cache is not differentiable"):
        model(ids, past_key_values=new_cache(model, True))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_frozen_embeddings_change_no_gradient(sharing):
    """As with adapters: nothing that enters the first layer has a gradient, but its weights have."""
    model, x = shared_model(sharing, dtype=torch.float64).train(), tokens()
    model.get_input_embeddings().requires_grad_(False)
    prompt = model(x[:, :6], use_cache=True)
    with pytest.raises(RuntimeError, match=r"continuing from a cache is not differentiable"):
        model(x[:, 6:], past_key_values=prompt.past_key_values)
    weight = model.model.layers[0].self_attn.v_proj.weight
    (one,) = torch.autograd.grad(model(x[:, :1], use_cache=False).logits.square().sum(), weight)
    (of_two,) = torch.autograd.grad(model(x[:, :2], use_cache=False).logits[:, :1].square().sum(), weight)
    torch.testing.assert_close(one, of_two)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_what_it_holds(sharing, family):
    """K once a group in mode qk, K and V once a group in mode kv."""
    model, ids = shared_model(sharing, family), tokens()
    _, owner, layout = SHARINGS[sharing]
    unshared, consumers = 10, model.layout.shared
    tensors = unshared - consumers if model.config.share_mode == "qk" else unshared - 2 * consumers
    tensors += 2 * (owner == "projection")
    head = model.config.head_dim * model.config.num_key_value_heads * 4
    cache = model(ids, use_cache=True).past_key_values
    assert cache.bytes_per_token() == tensors * head
    assert cache_bytes_per_token(model.config, dtype=torch.float32) == tensors * head
    assert cache_bytes_per_token(model.config, dtype=torch.bfloat16) == tensors * head // 2
    assert layout in repr(cache) and "13 tokens" in repr(cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_fast_prefill_equals_slow(sharing, family, monkeypatch):
    """logits_to_keep: the same logits and the same continuation, and in mode kv the upper layers see the last tokens alone."""
    model, ids = shared_model(sharing, family), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    rows = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    fast = sharing in ("kv", "kv-projection")
    for attention_mask in (None, mask):
        slow = model(ids, attention_mask=attention_mask, use_cache=True)
        for keep in (1, 3, 13, 20):
            rows.clear()
            quick = model(ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=keep)
            torch.testing.assert_close(quick.logits, slow.logits[:, -keep:], rtol=1e-5, atol=1e-5)
            if fast and keep < 13:
                # The owner itself needs its keys and values of all tokens, and the rest of it for the last ones.
                assert rows == [13, 13, keep if sharing == "kv" else 13, keep, keep]
            else:
                assert rows == [13] * 5
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1) if attention_mask is not None else None
        steps = [
            model(ids[:, :1], attention_mask=more, past_key_values=o.past_key_values).logits for o in (slow, quick)
        ]
        torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-5)
    # Positions by index, and hidden states, take the slow path.
    index = torch.tensor([2, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=index).logits, model(ids).logits[:, index])
    states = model(ids, logits_to_keep=1, output_hidden_states=True).hidden_states
    assert [s.shape[1] for s in states] == [13] * 6


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_reorder_crop_reset_and_repeat(sharing, static):
    model, ids = shared_model(sharing), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    one = torch.ones(2, 1, dtype=torch.long)
    cache = new_cache(model, static)
    model(ids, attention_mask=mask, past_key_values=cache)
    swap = torch.tensor([1, 0])
    cache.reorder_cache(swap)
    swapped = model(ids[:, -1:], attention_mask=torch.cat([mask[swap], one], 1), past_key_values=cache).logits
    whole = torch.cat([ids[swap], ids[:, -1:]], 1)
    want = model(whole, attention_mask=torch.cat([mask[swap], one], 1), use_cache=False).logits
    torch.testing.assert_close(swapped, want[:, -1:], **CLOSE)

    cache.crop(-5)
    assert int(cache.get_seq_length()) == 9
    tail = tokens(2, 4, seed=3)
    after = model(tail, attention_mask=torch.cat([mask[swap, :9], one.expand(2, 4)], 1), past_key_values=cache).logits
    whole = torch.cat([ids[swap, :9], tail], 1)
    want = model(whole, attention_mask=torch.cat([mask[swap, :9], one.expand(2, 4)], 1), use_cache=False).logits
    torch.testing.assert_close(after, want[:, 9:], **CLOSE)
    cache.crop(0)
    with pytest.raises(ValueError, match="minus the number of tokens"):
        cache.crop(3)

    cache.reset()
    assert int(cache.get_seq_length()) == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **CLOSE)
    if not static:
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        cache.batch_select_indices(torch.tensor([False, True, False, True]))
        got = model(ids[:, :1], past_key_values=cache).logits
        want = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        torch.testing.assert_close(got, want, **CLOSE)


@torch.no_grad()
def test_static_buffers_keep_their_addresses():
    model, ids = shared_model("qk"), tokens()
    cache = new_cache(model, True)
    model(ids[:, :5], past_key_values=cache)
    addresses = [t.data_ptr() for store in cache.layers for t in store.buffers()] + [cache.device_length.data_ptr()]
    for i in range(5, 13):
        model(ids[:, i : i + 1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.reset()
    model(ids, past_key_values=cache)
    assert addresses == [t.data_ptr() for s in cache.layers for t in s.buffers()] + [cache.device_length.data_ptr()]


def test_a_prompt_is_kept_as_it_comes():
    model = shared_model("qk")
    k, v = torch.randn(2, 5, 2, 4).transpose(1, 2), torch.randn(2, 5, 2, 4).transpose(1, 2)
    for grad in (False, True):
        cache = new_cache(model, False)
        with torch.set_grad_enabled(grad):
            cache.append_kv(0, k, v)
        kept = cache.layers[0].keys
        assert (kept.data_ptr() == k.data_ptr()) == (not grad)  # what a gradient may need is not written to again
        cache.commit(5, None)
        keys, _ = cache.append_kv(0, k[:, :, :1], v[:, :, :1])
        torch.testing.assert_close(keys, torch.cat([k, k[:, :, :1]], 2), rtol=0, atol=0)
        assert keys.data_ptr() != k.data_ptr()
    given = k.clone()  # the first tokens as they came: written to once the cache gave some back
    with torch.no_grad():
        cache = new_cache(model, False)
        cache.append_kv(0, given, v)
        cache.commit(5, None)
        cache.crop(-2)
        keys, _ = cache.append_kv(0, k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(keys, torch.cat([k[:, :, :3], k[:, :, :1]], 2), rtol=0, atol=0)


@torch.no_grad()
def test_a_pass_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    for static in (False, True):
        model, ids = shared_model("qk"), tokens()
        cache = new_cache(model, static)
        model(ids[:, :8], past_key_values=cache)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.model.layers[3].mlp, "forward", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            model(ids[:, :3], past_key_values=cache)
        assert int(cache.get_seq_length()) == 8
        torch.testing.assert_close(model(ids[:, 8:], past_key_values=cache).logits, model(ids).logits[:, 8:], **CLOSE)


@torch.no_grad()
def test_refused_by_name():
    model, ids = shared_model("qk"), tokens()
    with pytest.raises(TypeError, match=r"SharedCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    cache = model(ids, use_cache=True).past_key_values
    model.set_layout(4)
    with pytest.raises(ValueError, match="layout 0_1_2_2_2, but the model has 'qk', 0_1_2_3_3"):
        model(ids, past_key_values=cache)
    static = SharedCache(model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="holds 8 tokens, and 13 more do not fit"):
        model(ids, past_key_values=static)
    model(ids[:, :8], past_key_values=static)
    with pytest.raises(ValueError, match="holds 8 tokens, and 1 more do not fit"):
        model(ids[:, :1], past_key_values=static)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"\[2, 14\] \(cached and new tokens\), got \(2, 1\)"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match="holds"):
        model(ids[:1], past_key_values=cache)
    right = torch.ones(2, 14)
    right[0, 10:13] = 0
    with pytest.raises(ValueError, match="pad it on the left"):
        model(ids[:, :1], past_key_values=cache, attention_mask=right)
    with pytest.raises(TypeError, match="effcore's models only"):
        cache.update(None, None, 0)
