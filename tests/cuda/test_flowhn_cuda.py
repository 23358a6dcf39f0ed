"""FlowHN on a GPU: the same as on the CPU, causal, and decoding from CUDA graphs the same as without."""

import pytest
import torch

from effcore.methods.flowhn import STRATEGIES
from effcore.models import FlowHNCache, FlowHNConfig, FlowHNForCausalLM

pytestmark = pytest.mark.cuda


def model(strategy, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 4, "state_size": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "routing_length": 32, "attention_tokens": 12}
    made = FlowHNForCausalLM(FlowHNConfig(strategy=strategy, **(sizes | fields))).to("cuda", dtype).eval()
    with torch.no_grad():
        for p in made.parameters():  # larger than they begin, so that every path is seen in the logits
            if p.dim() == 2 and p.shape[1] > 16:
                p.normal_(std=0.1)
    return made


def ids(batch, tokens):
    return torch.randint(2, 97, (batch, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_and_gradients_equal_the_cpu(strategy):
    net, tokens, found = model(strategy).train(), ids(2, 70), {}
    for device in ("cuda", "cpu"):
        net.to(device).zero_grad()
        loss = net(tokens.to(device), labels=tokens.to(device)).loss
        loss.backward()
        found[device] = [loss.detach().cpu(), *(p.grad.cpu() for p in net.parameters())]
    for a, b in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_token_sees_a_later_one(strategy):
    net, tokens = model(strategy), ids(1, 70)
    with torch.no_grad():
        before = net(tokens).logits
        for at in range(70):
            changed = tokens.clone()
            changed[0, at] = (changed[0, at] + 7) % 97
            assert torch.equal(net(changed).logits[0, :at], before[0, :at]), at


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_captured_steps_equal_one_pass(strategy):
    net, tokens = model(strategy), ids(3, 140)
    cache = FlowHNCache(net.config, 140)
    with torch.no_grad():
        whole = net(tokens, use_cache=False).logits
        parts = [net(tokens[:, :21], past_key_values=cache).logits]
        parts += [net(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(21, 100)]
        captured = len(cache.graphs._graphs)
        parts.append(net(tokens[:, 100:107], past_key_values=cache).logits)  # a chunk between steps
        parts += [net(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(107, 140)]
    assert len(cache.graphs._graphs) == captured == (1 if strategy in ("none", "sequential") else len(set(paths(net))))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


def test_weights_that_moved_are_read_where_they_are():
    net, tokens, logits = model("fac"), ids(2, 30), []
    with torch.no_grad():
        for moves in (False, True):
            cache = FlowHNCache(net.config, 42)
            net(tokens, past_key_values=cache)
            for i in range(4):
                net(tokens[:, i : i + 1], past_key_values=cache)
            if moves:  # to the same numbers elsewhere, with others left in their old place
                for p in net.parameters():
                    old, p.data = p.data, p.data.clone()
                    old.zero_()
            logits.append([net(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(4, 12)])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


def paths(net):
    return [net.model.router.path(i) for i in range(net.config.routing_length)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
def test_generation_equals_the_one_without_a_cache(strategy, options, padded):
    net, prompt = model(strategy), ids(3, 17)
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :5] = 0
    options = options | {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = net.generate(prompt, use_cache=False, **options)
    for kind in ("dynamic", "static"):
        assert torch.equal(net.generate(prompt, cache_implementation=kind, **options), expected), kind
