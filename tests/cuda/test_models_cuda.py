"""Models with shared activations on a GPU: the same as on the CPU, compiled, and with a static cache."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import effcore

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
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    expected = m.generate(ids, use_cache=False, **options)
    assert torch.equal(m.generate(ids, cache_implementation=cache, **options), expected)


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
