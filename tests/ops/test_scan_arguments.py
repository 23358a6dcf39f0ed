"""A bad argument is an exception that names the argument, what was expected and what came."""

import pytest
import torch

from effcore.ops import scan as ops
from tests.support import REFUSED

X, WEIGHT, BIAS = torch.randn(2, 6, 8), torch.randn(8, 4), torch.randn(8)
A, B, D = -torch.rand(8, 3), torch.randn(2, 6, 3), torch.randn(8)
STATE = torch.randn(2, 8, 3)
ONE = X[:1]


def conv(x=X, weight=WEIGHT, bias=BIAS, **more):
    return ops.causal_conv1d(x, weight, bias, **more)


def scan(x=X, dt=X, A=A, B=B, C=B, D=D, **more):
    return ops.selective_scan(x, dt, A, B, C, D, **more)


def packed(*offsets, dtype=torch.int32):
    return scan(ONE, ONE, B=B[:1], C=B[:1], offsets=torch.tensor(offsets, dtype=dtype))


def step(state=STATE, x=X[:, 0], B=B[:, 0], **more):
    return ops.selective_step(state, x, x, A, B, B, D, **more)


CASES = {
    "x rank": (lambda: conv(x=X[0]), r"causal_conv1d: x must have 3 dimensions .*\[6, 8\]"),
    "x dtype": (lambda: conv(x=X.int()), "x is int32 but float32"),
    "x stride": (lambda: conv(x=X.mT.contiguous().mT), "x must be contiguous in its last dimension"),
    "weight shape": (lambda: conv(weight=WEIGHT[:7]), r"weight must have shape \[8, taps\] but has \[7, 4\]"),
    "weight width": (lambda: conv(weight=torch.randn(8, 9)), "weight has 9 taps but 2 to 8 are supported"),
    "weight width 1": (lambda: conv(weight=WEIGHT[:, :1]), "weight has 1 taps but 2 to 8"),
    "weight dtype": (lambda: conv(weight=WEIGHT.half()), "weight is float16 but must be float32"),
    "bias": (lambda: conv(bias=BIAS[:3]), r"bias must have shape \[8\] but has \[3\]"),
    "activation": (lambda: conv(activation="gelu"), "activation must be None or 'silu', got 'gelu'"),
    "conv state": (lambda: conv(initial_state=X), r"initial_state must have shape \[2, 3, 8\] but has \[2, 6, 8\]"),
    "conv state dtype": (lambda: conv(initial_state=X[:, :3].double()), "initial_state is float64 but must be float32"),
    "dt": (lambda: scan(dt=X[:, :5]), r"selective_scan: dt must have shape \[2, 6, 8\] but has \[2, 5, 8\]"),
    "dt dtype": (lambda: scan(dt=X.half()), "dt is float16 but must be float32"),
    "A channels": (lambda: scan(A=A[:5]), r"A must have shape \[8, states\] but has \[5, 3\]"),
    "A states": (lambda: scan(A=torch.randn(8, 257)), "A has 257 states but 1 to 256"),
    "A none": (lambda: scan(A=torch.randn(8, 0)), "A has 0 states but 1 to 256"),
    "A dtype": (lambda: scan(A=A.double()), "A is float64 but must be float32"),
    "B": (lambda: scan(B=B[..., :2]), r"B must have shape \[2, 6, 3\] but has \[2, 6, 2\]"),
    "C": (lambda: scan(C=B[:, :5]), r"C must have shape \[2, 6, 3\]"),
    "D": (lambda: scan(D=D[None]), r"D must have shape \[8\] but has \[1, 8\]"),
    "z": (lambda: scan(z=B), r"z must have shape \[2, 6, 8\]"),
    "dt_bias": (lambda: scan(dt_bias=D.half()), "dt_bias is float16 but must be float32"),
    "state shape": (lambda: scan(initial_state=STATE[:1]), r"initial_state must have shape \[2, 8, 3\]"),
    "state dtype": (
        lambda: scan(X.half(), X.half(), A, B.half(), B.half(), initial_state=STATE.half()),
        "initial_state is float16 but must be float32",
    ),
    "state strides": (lambda: scan(initial_state=STATE.mT.contiguous().mT), "initial_state must be contiguous"),
    "offsets dtype": (
        lambda: packed(0, 6, dtype=torch.int64),
        r"offsets must be int32 .*\.int\(\).* is an unsupported dtype",
    ),
    "offsets batch": (lambda: scan(offsets=torch.tensor([0, 6]).int()), "x must have one row .* got 2"),
    "offsets first": (lambda: packed(1, 6), r"offsets\[0\] must be 0 but is 1"),
    "offsets last": (lambda: packed(0, 5), r"offsets\[1\] must be the 6 tokens of x but is 5"),
    "offsets fall": (lambda: packed(0, 4, 3, 6), r"offsets\[1\] is 4 and offsets\[2\] is 3"),
    "offsets short": (lambda: packed(0), r"offsets must have shape \[sequences \+ 1\]"),
    "keep": (
        lambda: torch.ops.effcore.selective_scan(X, X, A, B, B, *[None] * 5, False, 2**62),
        r"keep must be from 0 to 2\^31, got 4611686018427387904",
    ),
    "step state": (lambda: step(state=STATE[:, :5].contiguous()), r"selective_step: state must have shape \[2, 8, 3\]"),
    "step x": (lambda: step(x=X), "x must have 2 dimensions"),
    "step B": (lambda: step(B=B[:, 0, :2]), r"B must have shape \[2, 1, 3\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    call, message = CASES[case]
    with pytest.raises(REFUSED, match=message) as error:
        call()
    assert str(error.value).startswith("effcore.")


def test_a_step_is_not_differentiable():
    with pytest.raises(RuntimeError, match=r"selective_step: not differentiable; call it under torch.no_grad"):
        step(state=STATE.clone().requires_grad_())


def test_second_derivatives_are_refused():
    x = X.double().requires_grad_()
    for out in (conv(x, WEIGHT.double(), None), scan(x, x, A.double(), B.double(), B.double(), None)):
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            dx.sum().backward()
