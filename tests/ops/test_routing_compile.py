"""torch.compile, opcheck, fake tensors and FLOP counts of the routing ops."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effcore.ops import routing as ops

_ops = torch.ops.effcore


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def there_and_back(x, q, k, weight):
    keep = x.shape[1] // 2
    with torch.no_grad():
        kept, rest = ops.score_partition(q, k, keep, protect=1)
    a, b = ops.separate_tokens(x, kept, rest)
    tokens, normed = ops.gather_layer_norm(x, kept, weight)
    return ops.merge_tokens(a * normed, kept, b, rest, residual=x, residual_a=tokens)


def by_list(x, q, k, weight):
    with torch.no_grad():
        kept, _ = ops.partition_tokens(ops.class_scores(q, k), x.shape[1] // 3)
    return ops.gather_rms_norm(x, kept, weight)[1] + ops.gather_tokens(x, kept)


def moved(x, q, k, weight):
    order = torch.arange(2 * x.shape[1]).roll(5).int()
    a, b = ops.permute_tokens(x.flatten(0, 1), order, order.argsort().int(), [x.shape[1]] * 2)
    (back,) = ops.permute_tokens(torch.cat([a * weight, b.sin()]), order.argsort().int(), order)
    return back.view_as(x) + x


FUNCTIONS = {"partition": there_and_back, "list": by_list, "order": moved}


def tensors(tokens):
    x, weight = torch.randn(2, tokens, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    return x, torch.randn(2, 2, 1, 4), torch.randn(2, 2, tokens, 4), weight


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph_gives_the_same_numbers(name, backend):
    inputs = tensors(21)
    outs = [
        (out, *torch.autograd.grad(out.square().sum(), (inputs[0], inputs[3])))
        for out in (
            f(*inputs) for f in (FUNCTIONS[name], torch.compile(FUNCTIONS[name], fullgraph=True, backend=backend))
        )
    ]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dynamic_lengths_take_one_graph(name):
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(FUNCTIONS[name], fullgraph=True, backend=counter, dynamic=True)
    compiled = []
    for tokens in (16, 25, 70, 130):
        inputs = tensors(tokens)
        torch.testing.assert_close(function(*inputs), FUNCTIONS[name](*inputs))
        compiled.append(counter.frame_count)
    assert compiled == compiled[:1] * 4


def samples():
    x, a, b, own = (torch.randn(2, n, 5, requires_grad=True) for n in (7, 4, 3, 4))
    weight, bias = (torch.randn(5, requires_grad=True) for _ in range(2))
    kept, rest = ops.partition_tokens(torch.rand(2, 7), 4)
    q, k = torch.randn(2, 4, 1, 3), torch.randn(2, 2, 7, 3)
    yield "partition_tokens", (torch.rand(2, 7), 4, 1)
    yield "partition_tokens", (torch.rand(2, 7, dtype=torch.float64), 0, 0)
    yield "class_scores", (q, k, None)
    yield "score_partition", (q, k, 4, 1, 0.3)
    yield "gather_tokens", (x, kept)
    yield "gather_tokens", (x.transpose(0, 1).contiguous().transpose(0, 1), kept[:1].expand(2, -1))
    yield "gather_tokens_bwd", (torch.randn(2, 4, 5), kept, 7)
    yield "separate_tokens", (x, kept, rest)
    yield "merge_tokens", (a, kept, b, rest, None, None)
    yield "merge_tokens", (a, kept, b, rest, x, own)
    for rms in (False, True):
        yield "gather_norm", (x, kept, weight, None if rms else bias, 1e-5, rms)
        tokens, _, mean, rstd = (t.detach() for t in _ops.gather_norm(x, kept, weight, None, 1e-5, rms))
        grads = torch.randn_like(tokens), torch.randn_like(tokens)
        yield "gather_norm_bwd", (*grads, tokens, kept, weight.detach(), mean, rstd, 7, rms, not rms)
    yield "gather_norm_bwd", (None, grads[1], tokens, kept, weight.detach(), mean, rstd, 7, True, False)


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(_ops, name).default, arguments)


def test_flop_counts():
    x, q, k, weight = tensors(20)
    with FlopCounterMode(display=False) as counter:
        there_and_back(x, q, k, weight).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 20 * 4
