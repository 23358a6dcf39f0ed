"""torch.compile, opcheck, fake tensors and FLOP counts of the attention ops."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effcore.ops import attention as ops
from tests.ops.test_attention_sharing import kv_group, leaves_of, qk_group, weighted

_ops = torch.ops.effcore


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def plain(q, k, v, w):
    return [ops.attention(q, k, v, causal=True), ops.attention(q, k, w)]


FUNCTIONS = {
    "plain": plain,
    "qk lse": lambda q, k, v, w: qk_group(ops, q, k, [v, w], keep="lse", causal=True),
    "qk probs": lambda q, k, v, w: qk_group(ops, q, k, [v, w], keep="probs", causal=True),
    "qk auto": lambda q, k, v, w: qk_group(ops, q, k, [v, w], keep="auto", causal=True),
    "kv": lambda q, k, v, w: kv_group(ops, [q, w], k, v, causal=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph_gives_the_same_numbers(name, backend):
    tensors = [torch.randn(2, 2, 20, 8) for _ in range(4)]
    results = []
    for function in (FUNCTIONS[name], torch.compile(FUNCTIONS[name], fullgraph=True, backend=backend)):
        leaves = leaves_of(*tensors)
        outs = function(*leaves)
        results.append([*outs, *torch.autograd.grad(weighted(outs), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dynamic_lengths_take_one_graph(name):
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(FUNCTIONS[name], fullgraph=True, backend=counter, dynamic=True)
    for tokens in (16, 24, 70, 130):
        tensors = [torch.randn(2, 2, tokens, 8) for _ in range(4)]
        leaves, expected = leaves_of(*tensors), leaves_of(*tensors)
        a, b = function(*leaves), FUNCTIONS[name](*expected)
        for x, y in zip(
            [*a, *torch.autograd.grad(weighted(a), leaves)],
            [*b, *torch.autograd.grad(weighted(b), expected)],
            strict=True,
        ):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


def samples():
    q, k, v, w = (torch.randn(2, 4, 9, 8) for _ in range(4))
    k, v, w = k[:, :2], v[:, :2], w[:, :2]
    lengths, first = torch.tensor([9, 4], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    seen = (lengths, first, True, None)
    out, lse = _ops.attention(q, k, v, *seen)
    dout = torch.randn_like(out)
    grad = [t.clone().requires_grad_() for t in (q, k, v, w)]
    yield "attention", (q, k, v, *seen)
    yield "attention", (*grad[:3], None, None, False, 0.2)
    yield "attention", (*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), *seen)
    yield "attention_bwd", (dout, q, k, v, out, lse, *seen, False)
    yield "attention_bwd", (dout, q, k, v, out, lse, *seen, True)
    yield "attention_bwd", (dout, q, k, v, out, lse, *seen, True, k.float(), v.float())
    for keep in (0, 1):
        yield "attention_with_scores", (*grad[:3], *seen, 2, keep)
        out, lse, probs, delta, douts, values, uses = _ops.attention_with_scores(q, k, v, *seen, 2, keep)
        slots = [t.detach().requires_grad_() for t in (delta, douts[0], values[0], uses[0])]
        yield "attention_from_scores", (q, k, grad[3], lse, probs, *slots, *seen)
        _, d = _ops.attention_from_scores_bwd(dout, out, q, k, w, lse, probs, *seen)
        yield "attention_from_scores_bwd", (dout, out, q, k, w, lse, probs, *seen)
        yield (
            "attention_with_scores_bwd",
            (q, k, out, lse, probs, d, [dout, dout.clone()], [v, w], [torch.ones(())], *seen),
        )
    yield "share_kv", tuple(grad[1:3])
    yield (
        "attention_shared_kv",
        (grad[0], k, v, *(t.detach().requires_grad_() for t in _ops.share_kv(k, v)), *seen),
    )
    token = q[:, :, :1].contiguous()
    for probs in (False, True):
        yield "decode_attention", (token, k, v, lengths, first, None, probs)
    _, weights, scales = _ops.decode_attention(token, k, v, lengths, first, None, True)
    yield "decode_from_probs", (weights, scales, w, lengths, first)


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(_ops, name).default, arguments)


@pytest.mark.parametrize("queries", [0, 1, 5, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("keys", [0, 1, 64, 100, 129, 256])
def test_fake_size_of_kept_probabilities(queries, keys):
    q, k = torch.randn(1, 1, queries, 4), torch.randn(1, 1, keys, 4)
    for causal in (True, False):
        probs = _ops.attention_with_scores(q, k, k, None, None, causal, None, 1, 1)[2]
        assert probs.shape[2] == ops._autograd.probs_elements(queries, keys, causal)


def test_flop_counts():
    q, k, v, w = leaves_of(*(torch.randn(2, 4, 32, 8) for _ in range(4)))
    product = 2 * 2 * 4 * 32 * 32 * 8
    for keep, forward, backward in (("lse", 2 + 2, 2 + 6), ("probs", 2 + 1, 1 + 5)):
        with FlopCounterMode(display=False) as counter:
            outs = qk_group(ops, q, k, [v, w], keep=keep)
        assert counter.get_total_flops() == forward * product
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(weighted(outs), [q, k, v, w])
        assert counter.get_total_flops() == backward * product
