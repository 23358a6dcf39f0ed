"""torch.compile, opcheck, fake tensors and FLOP counts of the scan ops."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effcore.ops import scan as ops

_ops = torch.ops.effcore


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def mixer(x, dt, B, weight, A):
    x = ops.causal_conv1d(x, weight, activation="silu")
    out, state = ops.selective_scan(x, dt, A, B, B, z=x, dt_softplus=True, return_final_state=True)
    return out * state.mean()


def tensors(tokens):
    made = [torch.randn(shape) for shape in ((2, tokens, 6), (2, tokens, 6), (2, tokens, 3), (6, 4))]
    return [t.requires_grad_() for t in (*made, -torch.rand(6, 3))]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph_gives_the_same_numbers(backend):
    inputs = tensors(21)
    outs = [
        (out, *torch.autograd.grad(out.sin().sum(), inputs))
        for out in (f(*inputs) for f in (mixer, torch.compile(mixer, fullgraph=True, backend=backend)))
    ]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


def test_dynamic_lengths_take_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(mixer, fullgraph=True, backend=counter, dynamic=True)
    compiled = []
    for tokens in (16, 25, 70, 130):
        inputs = tensors(tokens)
        torch.testing.assert_close(function(*inputs), mixer(*inputs))
        compiled.append(counter.frame_count)
    assert compiled == compiled[:1] * 4


def samples():
    x, dt, B, weight, A = tensors(21)
    z, D, bias = torch.randn(2, 21, 6, requires_grad=True), torch.randn(6), torch.randn(6)
    state, before = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    one, offsets = [t[:1].detach() for t in (x, dt, B)], torch.tensor([0, 4, 4, 21], dtype=torch.int32)
    yield "causal_conv1d", (x, weight, None, None, None, False)
    yield "causal_conv1d", (x, weight, bias, before, None, True)
    yield "causal_conv1d", (one[0], weight, bias, None, offsets, True)
    with torch.no_grad():
        yield (
            "causal_conv1d_bwd",
            (torch.randn(2, 21, 6), x.detach(), weight.detach(), bias, before.detach(), None, True),
        )
        yield "causal_conv1d_bwd", (torch.randn(1, 21, 6), one[0], weight.detach(), None, None, offsets, False)
    yield "selective_scan", (x, dt, A, B, B, None, None, None, None, None, False, 0)
    yield "selective_scan", (x, dt, A, B, B, D, z, bias, state, None, True, 8)
    yield "selective_scan", (*one[:2], A, one[2], one[2], D, None, bias, None, offsets, True, 8)
    for packing in (None, offsets):
        rows = [t.detach() for t in (x, dt, B)] if packing is None else one
        x_, dt_, B_ = rows
        call = (x_, dt_, A.detach(), B_, B_, D, None, bias)
        _, _, states = _ops.selective_scan(*call, None, packing, True, 8)
        dfinal = torch.randn(2 if packing is None else 3, 6, 3)
        yield "selective_scan_bwd", (torch.randn_like(x_), dfinal, *call, packing, states, True, 8, True)
        yield "selective_scan_bwd", (torch.randn_like(x_), None, *call, packing, states, True, 8, False)
    yield "selective_step", (state.detach(), x[:, 0].detach(), dt[:, 0].detach(), A.detach(), B[:, 0].detach(),
                             B[:, 0].detach(), D, z[:, 0].detach(), bias, True)  # fmt: skip


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(_ops, name).default, arguments)


def test_flop_counts():
    x, dt, B, weight, A = tensors(20)
    with FlopCounterMode(display=False) as counter:
        out = ops.selective_scan(ops.causal_conv1d(x, weight), dt, A, B, B)
        out.sum().backward()
        with torch.no_grad():
            ops.selective_step(torch.zeros(2, 6, 3), x[:, 0], dt[:, 0], A, B[:, 0], B[:, 0])
    pairs = 2 * 20 * 6
    assert counter.get_total_flops() == (2 + 4) * pairs * 4 + (7 + 18) * pairs * 3 + 7 * 2 * 6 * 3
