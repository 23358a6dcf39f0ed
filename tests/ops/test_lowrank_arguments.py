"""A bad argument is an exception that names the argument, what was expected and what came."""

import pytest
import torch

from effcore.ops import lowrank as ops
from tests.support import REFUSED

X, DOWN, UP, BIAS = torch.randn(2, 8), torch.randn(3, 8), torch.randn(5, 3), torch.randn(5)

CASES = {
    "activation": (lambda: ops.lowrank_linear(X, DOWN, UP, activation="tanh"), "activation must be one of.*'tanh'"),
    "code": (lambda: torch.ops.effcore.lowrank_linear(X, DOWN, UP, None, 9), "activation must be a code from 0 to 4, got 9"),
    "scalar": (lambda: ops.lowrank_linear(torch.tensor(1.0), DOWN, UP), "x must have at least 1 dimension"),
    "dtype": (lambda: ops.lowrank_linear(X.int(), DOWN.int(), UP.int()), "x is int32 but float32"),
    "down dtype": (lambda: ops.lowrank_linear(X, DOWN.half(), UP), "down is float16 but x is float32"),
    "up dtype": (lambda: ops.lowrank_linear(X, DOWN, UP.double()), "up is float64 but x is float32"),
    "down rank": (lambda: ops.lowrank_linear(X, DOWN[0], UP), r"down must have 2 dimensions \[rank, in\].*\[8\]"),
    "up rank": (lambda: ops.lowrank_linear(X, DOWN, UP[None]), r"up must have 2 dimensions \[out, rank\]"),
    "features": (lambda: ops.lowrank_linear(X[:, :7], DOWN, UP), "down takes 8 features but x has 7"),
    "ranks": (lambda: ops.lowrank_linear(X, DOWN, UP[:, :2]), "up has rank 2 but down has rank 3"),
    "bias": (lambda: ops.lowrank_linear(X, DOWN, UP, BIAS[:4]), r"bias must have shape \[5\] but has \[4\]"),
    "bias dtype": (lambda: ops.lowrank_linear(X, DOWN, UP, BIAS.half()), "bias is float16 but x is float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    call, message = CASES[case]
    with pytest.raises(REFUSED, match=message):
        call()


def test_second_derivatives_are_refused():
    x = X.double().requires_grad_()
    out = torch.ops.effcore.lowrank_linear(x, DOWN.double(), UP.double(), None, 2)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()
