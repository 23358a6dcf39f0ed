"""torch.compile, opcheck, fake tensors and FLOP counts of the lowrank ops."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effcore.ops import lowrank as ops

_ops = torch.ops.effcore


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def two_layers(x, down, up, bias):
    return ops.lowrank_linear(
        ops.lowrank_linear(x, down, up, bias, activation="gelu"), up.T.contiguous(), down.T.contiguous()
    )


def tensors(rows):
    return tuple(torch.randn(*s, requires_grad=True) for s in [(2, rows, 8), (3, 8), (6, 3), (6,)])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph_gives_the_same_numbers(backend):
    inputs = tensors(5)
    outs = [
        (out, *torch.autograd.grad(out.square().sum(), inputs))
        for out in (f(*inputs) for f in (two_layers, torch.compile(two_layers, fullgraph=True, backend=backend)))
    ]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dynamic_rows_take_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(two_layers, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 7, 40, 90):  # on both sides of the fused kernel
        inputs = tensors(rows)
        torch.testing.assert_close(function(*inputs), two_layers(*inputs), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def samples():
    x, down, up, bias = tensors(4)
    wide = torch.randn(70, 8, requires_grad=True)
    for activation in (0, 1, 2):
        for some in (x, wide):
            yield "lowrank_linear", (some, down, up, bias, activation)
            with torch.no_grad():
                yield "lowrank_linear_saving", (some.detach(), down.detach(), up.detach(), None, activation)
                out, hidden, before = _ops.lowrank_linear_saving(some, down, up, bias, activation)
            dout = torch.randn_like(out)
            saved = (some.detach(), down.detach(), up.detach(), hidden, out if activation == 1 else before)
            yield "lowrank_linear_bwd", (dout, *saved, activation, True, True, True, True)
            yield "lowrank_linear_bwd", (dout, *saved, activation, False, True, False, False)
    yield "lowrank_limits", (x,)


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments):
    if name == "lowrank_limits":
        least, most, *_ = getattr(_ops, name)(*arguments)
        assert 1 <= least <= most
    else:
        torch.library.opcheck(getattr(_ops, name).default, arguments)


def test_flop_counts():
    x, down, up, bias = (
        t.requires_grad_() for t in (torch.randn(50, 8), torch.randn(3, 8), torch.randn(6, 3), torch.randn(6))
    )
    with FlopCounterMode(display=False) as counter:
        out = _ops.lowrank_linear(x, down, up, bias, 2)
    assert counter.get_total_flops() == 2 * 50 * 3 * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 50 * 3 * (8 + 6)
