"""lowrank_linear against the reference: forward, backward, both ways of computing it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcore.ops import lowrank as ops
from effcore.reference import lowrank as ref
from tests.support import assert_accurate, poisoned_memory

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ["out", "dx", "ddown", "dup", "dbias"]


@st.composite
def problems(draw):
    """Rows on both sides of what the fused kernel takes; sizes on both sides of a vector, a tile and a task."""
    rows = draw(st.sampled_from([0, 1, 2, 3, 4, 7, 15, 16, 17, 33, 64, 65, 100]))
    features, rank, out = (
        draw(st.sampled_from(sizes))
        for sizes in ([0, 1, 3, 16, 33, 64, 130], [0, 1, 2, 7, 16, 31, 32, 70], [0, 1, 5, 31, 32, 33, 100])
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["plain", "sliced", "expanded"]))

    def matrix(n, m, scale=1.0):
        if layout == "sliced":  # a part of a wider matrix at an odd offset
            return (torch.randn(n, m + 3) * scale).to(dtype)[:, 1 : m + 1]
        if layout == "expanded":
            return (torch.randn(1, m) * scale).to(dtype).expand(n, m)
        return (torch.randn(n, m) * scale).to(dtype)

    x, down, up = matrix(rows, features), matrix(rank, features, features**-0.5 if features else 1), matrix(out, rank)
    bias = torch.randn(out).to(dtype) if draw(st.booleans()) else None
    return x, down, up, bias, draw(st.sampled_from(ops.ACTIVATIONS))


def run(function, problem, dtype=None, grad=True):
    """The result and, with grad, the gradients of all leaves."""
    *tensors, activation = problem
    leaves = [
        None if t is None else (t if dtype is None else t.to(dtype)).detach().requires_grad_(grad) for t in tensors
    ]
    out = function(*leaves, activation=activation)
    if not grad:
        return [out]
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(tensors[0].dtype).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], dout)]


@given(problems())
def test_against_the_reference(problem):
    with poisoned_memory():
        ours = run(ops.lowrank_linear, problem)
        plain = run(ops.lowrank_linear, problem, grad=False)
    assert torch.equal(ours[0], plain[0]), "training and inference agree"
    same, exact = run(ref.lowrank_linear, problem), run(ref.lowrank_linear, problem, torch.float64)
    terms = 4.0 * max((t.abs().max().item() for t in exact if t.numel()), default=1.0)
    for name, a, b, c in zip(NAMES, ours, same, exact, strict=False):
        assert_accurate(a, b, c, what=name, terms=terms)


@given(problems())
def test_the_op_takes_every_size(problem):
    """The public function leaves large problems to torch; the op (which compiled code calls) must serve them too."""
    code = ops.ACTIVATIONS.index(problem[-1])
    with poisoned_memory():
        ours = run(lambda *t, activation: torch.ops.effcore.lowrank_linear(*t, code), problem)
    for name, a, b, c in zip(
        NAMES, ours, run(ref.lowrank_linear, problem), run(ref.lowrank_linear, problem, torch.float64), strict=False
    ):
        assert_accurate(a, b, c, what=name, terms=4.0 * (c.abs().max().item() if c.numel() else 1.0))


@pytest.mark.parametrize("rows", [4, 7, 16])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_float32_beyond_the_cache(rows, activation):
    """Small float32 factors are torch's; these are the kernel's."""
    x, down, up, bias = torch.randn(rows, 1001), torch.randn(301, 1001) / 32, torch.randn(2103, 301), torch.randn(2103)
    assert ops._within(ops._boxes(False, torch.float32), x, down, up), "no longer what this test is for"
    problem = x, down, up, bias, activation
    with poisoned_memory():
        (ours,) = run(ops.lowrank_linear, problem, grad=False)
    (same,), (exact,) = (run(ref.lowrank_linear, problem, d, grad=False) for d in (None, torch.float64))
    assert_accurate(ours, same, exact, terms=4.0 * exact.abs().max().item())


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("rows", [3, 40])
def test_gradcheck(activation, rows):
    tensors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(rows, 5), (4, 5), (6, 4), (6,)]
    ]
    op = torch.ops.effcore.lowrank_linear
    code = ops.ACTIVATIONS.index(activation)
    assert torch.autograd.gradcheck(lambda *t: op(*t, code), tensors)
    assert torch.autograd.gradcheck(lambda *t: op(*t, None, code), tensors[:3])


@pytest.mark.parametrize("wanted", range(4))
def test_only_one_gradient_is_wanted(wanted):
    tensors = [torch.randn(*shape) for shape in [(2, 3, 5), (4, 5), (6, 4), (6,)]]
    tensors[wanted].requires_grad_()
    ours = torch.autograd.grad(torch.ops.effcore.lowrank_linear(*tensors, 2).square().sum(), tensors[wanted])
    same = torch.autograd.grad(ref.lowrank_linear(*tensors, activation="gelu").square().sum(), tensors[wanted])
    torch.testing.assert_close(ours, same)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_to_the_ends_of_the_range(activation, dtype):
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.tensor([0.0, -0.0, 1e-6, float("inf"), float("nan")])]).to(
        dtype
    )
    one = torch.ones(1, 1, dtype=dtype)
    arguments = x[:, None], one, one
    code = ops.ACTIVATIONS.index(activation)
    ours = torch.ops.effcore.lowrank_linear(*arguments, None, code)
    exact = ref.activate(x.double(), activation)[:, None]
    assert_accurate(ours, ref.activate(x, activation)[:, None], exact)
    # the tail, relative to its own size: 1 - Φ must not be computed as a difference
    tail = (x < 0) & (x > -5) & (exact[:, 0].abs() > torch.finfo(dtype).tiny)  # further out torch's float64 cancels too
    error = ((ours[:, 0].double() - exact[:, 0]) / exact[:, 0])[tail].abs()
    if activation != "relu":
        assert error.max() < max(40 * torch.finfo(dtype).eps, 1e-9)


def test_threads_do_not_change_the_result():
    x, down, up = torch.randn(5, 300), torch.randn(200, 300), torch.randn(3000, 200)
    before = torch.get_num_threads()
    try:
        outs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs += [torch.ops.effcore.lowrank_linear(x.bfloat16(), down.bfloat16(), up.bfloat16(), None, 0)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(o, outs[0]) for o in outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, down, up = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = ops.lowrank_linear(x, down, up, torch.randn(6), activation="silu")
    assert out.dtype == dtype
    out.float().sum().backward()
    assert down.grad.dtype == torch.float32 and up.grad.dtype == torch.float32


def test_shapes():
    down, up = torch.randn(3, 8), torch.randn(5, 3)
    for shape in [(8,), (2, 8), (2, 3, 8), (1, 2, 3, 8), (1, 1, 2, 3, 1, 8)]:
        out = ops.lowrank_linear(torch.randn(shape), down, up)
        assert out.shape == (*shape[:-1], 5) and out.is_contiguous()
    x = torch.randn(4, 8, 6).transpose(1, 2)  # a strided last dimension is copied
    torch.testing.assert_close(ops.lowrank_linear(x, down, up), ref.lowrank_linear(x, down, up))
    with torch.no_grad():
        strided = torch.ops.effcore.lowrank_linear(x, torch.randn(8, 3).copy_(down.T).T, up.T.contiguous().T, None, 0)
    torch.testing.assert_close(strided, ref.lowrank_linear(x, down, up))
