"""torch.compile, opcheck, fake tensors and FLOP counts of the kronecker ops."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effcore.ops import kronecker as ops

_ops = torch.ops.effcore
INT = torch.int32


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def accumulate(x, offsets, total, basis, discarded):
    gram = ops.grouped_gram(x, offsets)
    ops.grouped_gram(x * 2, offsets, beta=1.0, out=total)
    basis, discarded = ops.grouped_lowrank_update(basis, discarded, x, offsets)
    return gram.sum(0), total * 2, basis.square().sum(1), discarded


def arguments(tokens):
    x, offsets = torch.randn(tokens, 6), torch.tensor([0, tokens // 3, tokens], dtype=INT)
    return x, offsets, torch.ones(2, 6, 6), torch.zeros(2, 6, 3), torch.zeros(2)


def run(function, inputs):
    inputs = [t.clone() for t in inputs]
    return [*function(*inputs), inputs[2]]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph_gives_the_same_numbers_and_writes_into_out(backend):
    inputs = arguments(21)
    compiled = torch.compile(accumulate, fullgraph=True, backend=backend)
    for a, b in zip(run(accumulate, inputs), run(compiled, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_dynamic_lengths_take_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(accumulate, fullgraph=True, backend=counter, dynamic=True)
    compiled = []
    for tokens in (16, 25, 70):
        inputs = arguments(tokens)
        for a, b in zip(run(accumulate, inputs), run(function, inputs), strict=True):
            torch.testing.assert_close(a, b)
        compiled.append(counter.frame_count)
    assert compiled == compiled[:1] * 3


def samples():
    x, offsets, total, basis, discarded = arguments(9)
    yield "grouped_gram", (x, offsets, 1.0)
    yield "grouped_gram", (x.bfloat16(), offsets, 0.5)
    yield "grouped_gram_", (total, x, offsets, 0.5, 2.0)
    yield "grouped_gram_", (total.double(), x.double(), offsets, 0.5, 0.0)
    yield "grouped_lowrank_update", (basis, discarded, x, offsets)
    example = torch.arange(9) % 2
    g = torch.randn(9, 3, 4)
    a = torch.randn(2, 6, 2), torch.rand(2, 2), torch.rand(2)
    b = torch.randn(2, 4, 4), torch.rand(2, 4), torch.rand(2)
    yield "kron_variance", (x, g, offsets, example, 2, *a, *b, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(_ops, name).default, arguments)


def test_flop_count_of_a_gram_is_half_a_product():
    x, offsets, *_ = arguments(20)
    with FlopCounterMode(display=False) as counter:
        ops.grouped_gram(x, offsets)
    assert counter.get_total_flops() == 20 * 6 * 7
