"""Models with shared activations on a GPU: the same as on the CPU, compiled, and with a static cache."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import effcore
from effcore.models import SharedCache, step_graph

pytestmark = pytest.mark.cuda


def model(mode: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    )
    return effcore.share_activations(LlamaForCausalLM(config), mode=mode, start=2).to("cuda", dtype).eval()


@pytest.mark.parametrize("mode", ["qk", "kv"])
def test_loss_and_gradients_equal_the_cpu(mode):
    gpu = model(mode)
    ids = torch.randint(0, 97, (2, 70))
    losses = {}
    for device in ("cuda", "cpu"):
        m = gpu.to(device).train()
        m.zero_grad()
        loss = m(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        losses[device] = [loss.detach().cpu(), *(p.grad.cpu() for p in m.parameters() if p.grad is not None)]
    for a, b in zip(losses["cuda"], losses["cpu"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("mode", ["qk", "kv"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_the_one_without_a_cache(mode, cache):
    m = model(mode)
    ids = torch.randint(2, 97, (3, 17), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = m.generate(ids, use_cache=False, **options)
    assert torch.equal(m.generate(ids, cache_implementation=cache, **options), expected)


@pytest.fixture
def replays(monkeypatch):
    """The decoding steps that came from a graph."""
    replay, counted = torch.cuda.CUDAGraph.replay, []

    def count(graph):
        counted.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    return counted


def decode(m, ids, cache, begin):
    """Logits of tokens ``begin`` .. of ``ids``: the first of them in one pass, the others one by one."""
    logits = [m(ids[:, :begin], past_key_values=cache).logits]
    logits += [m(ids[:, i : i + 1], past_key_values=cache).logits for i in range(begin, ids.shape[1])]
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["qk", "kv"])
def test_replayed_steps_equal_one_pass(mode, compiled, replays):
    m = model(mode)
    ids = torch.randint(2, 97, (3, 20), device="cuda")
    expected = m(ids, use_cache=False).logits
    if compiled:
        m.compile_pieces()
    cache = SharedCache(m.config, m.layout, 24)
    torch.testing.assert_close(decode(m, ids, cache, 12), expected, rtol=1e-4, atol=1e-4)
    assert len(replays) == 7  # of 8 steps the first is recorded
    cache.reset()  # another prompt of another length behind the same buffers
    torch.testing.assert_close(decode(m, ids.flip(0), cache, 5), expected.flip(0), rtol=1e-4, atol=1e-4)
    assert len(replays) >= 7 + 13
    twin = copy.deepcopy(cache)
    cache.crop(-1), twin.crop(-1)
    for held in (cache, twin):
        logits = m(ids.flip(0)[:, -1:], past_key_values=held).logits
        torch.testing.assert_close(logits[:, 0], expected.flip(0)[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_step_is_recorded_anew_for_what_moved(replays):
    m = model("qk")
    ids = torch.randint(2, 97, (2, 20), device="cuda")
    cache = SharedCache(m.config, m.layout, 24)
    decode(m, ids[:, :12], cache, 8)
    assert len(replays) == 3
    for weight in m.parameters():
        weight.data = weight.data * 1.25
    for other in (m, copy.deepcopy(m)):  # weights elsewhere, another model
        cache.crop(-1)
        twin = SharedCache(m.config, m.layout, 24)
        decode(other, ids[:, :11], twin, 10)
        del replays[:]
        cache.device_length.fill_(11)
        for new, old in zip(twin._held, cache._held, strict=True):
            for a, b in zip(new.buffers(), old.buffers(), strict=True):
                b.copy_(a)
        got = other(ids[:, 11:12], past_key_values=cache).logits
        assert not replays
        torch.testing.assert_close(got, other(ids[:, 11:12], past_key_values=twin).logits, rtol=1e-4, atol=1e-4)
    assert step_graph.can_replay(cache, ids[:, :1], None, m)
    with torch.autocast("cuda", torch.bfloat16):
        assert not step_graph.can_replay(cache, ids[:, :1], None, m)
    with torch.enable_grad():
        assert not step_graph.can_replay(cache, ids[:, :1], None, m)
    growing = torch.ones(2, 13, device="cuda")
    assert not step_graph.can_replay(cache, ids[:, :1], growing, m) and not step_graph.can_replay(cache, ids, None, m)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
@pytest.mark.parametrize("mode", ["qk", "kv"])
@pytest.mark.parametrize("inference", [False, True])
def test_generation_replays_steps(mode, options, inference, replays):
    m = model(mode)
    ids = torch.randint(2, 97, (3, 17), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = options | {"attention_mask": mask, "max_new_tokens": 12}
    expected = m.generate(ids, use_cache=False, **options)
    with torch.inference_mode(inference):
        got = m.generate(ids, cache_implementation="static", **options)
    assert torch.equal(got, expected) and len(replays) >= 9


@pytest.mark.parametrize("mode", ["qk", "kv"])
def test_bfloat16_compiled_pieces_train(mode):
    m = model(mode, torch.bfloat16).train()
    m.compile_pieces()
    ids = torch.randint(0, 97, (2, 128), device="cuda")
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = m(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
