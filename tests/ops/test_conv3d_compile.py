"""torch.compile, opcheck, fake tensors and FLOP counts of the cross-shaped 3D convolution."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effcore.ops import conv3d as ops

_ops = torch.ops.effcore


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def network(x, spatial, temporal, bias):
    x = ops.cross_conv3d(x, spatial, temporal, bias)
    return ops.cross_conv3d(x.relu(), spatial, temporal, stride=(1, 2, 2)).square()


def tensors(height=7):
    made = torch.randn(2, 5, 3, height, 6), torch.randn(5, 5, 3, 3), torch.randn(5, 5, 3), torch.randn(5)
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph_gives_the_same_numbers(backend):
    inputs = tensors()
    outs = [
        (out, *torch.autograd.grad(out.sum(), inputs))
        for out in (f(*inputs) for f in (network, torch.compile(network, fullgraph=True, backend=backend)))
    ]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_in_a_graph():
    inputs = tensors()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        outs = [f(*inputs) for f in (network, compiled)]
    torch.testing.assert_close(*outs)
    assert not torch.equal(outs[0], network(*inputs).to(outs[0].dtype))


def test_dynamic_sizes_take_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(network, fullgraph=True, backend=counter, dynamic=True)
    compiled = []
    for height in (8, 9, 13, 20):
        inputs = tensors(height)
        torch.testing.assert_close(function(*inputs), network(*inputs))
        compiled.append(counter.frame_count)
    assert compiled == compiled[:1] * 4


def samples():
    x, spatial, temporal, bias = tensors()
    last = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    dout = torch.randn(2, 5, 3, 4, 3)
    yield "cross_conv3d", (x, spatial, temporal, bias, [1, 1, 1], [1, 1, 1])
    yield "cross_conv3d", (last, spatial, temporal, None, [1, 2, 2], [1, 1, 1])
    plain = [t.detach() for t in (x, spatial, temporal)]
    yield "cross_conv3d_bwd_data", (dout, *plain[1:], [1, 2, 2], [1, 1, 1], 3, 7, 6)
    for inside in (False, True):
        yield "cross_conv3d_bwd_weight", (plain[0], dout, [3, 3, 3], [1, 2, 2], [1, 1, 1], inside)


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(_ops, name).default, arguments)


def test_flop_counts():
    inputs = tensors()
    with FlopCounterMode(display=False) as counter:
        ops.cross_conv3d(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 11 * 25 * 2 * 3 * 7 * 6
