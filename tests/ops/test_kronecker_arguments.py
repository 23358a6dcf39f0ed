"""A bad argument is an exception that names the argument, what was expected and what came."""

import pytest
import torch

from effcore.ops import kronecker as ops
from tests.support import REFUSED

X = torch.randn(6, 4)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


OFFSETS = i32(0, 2, 6)
BASIS, DISCARDED = torch.zeros(2, 4, 3), torch.zeros(2)
EXAMPLE, G = torch.zeros(6, dtype=torch.long), torch.randn(6, 2, 3)


def factor(dim, rank, experts=2):
    return ops.Factor(torch.randn(experts, dim, rank), torch.rand(experts, rank), torch.rand(experts))


def variance(a=X, g=G, example=EXAMPLE, fa=None, fb=None):
    return ops.kron_variance(a, g, OFFSETS, example, 1, fa or factor(4, 2), fb or factor(3, 2), torch.ones(1))


def update(basis=BASIS, discarded=DISCARDED, x=X, offsets=OFFSETS):
    return ops.grouped_lowrank_update(basis, discarded, x, offsets)


def gram_into(out):
    return ops.grouped_gram(X, OFFSETS, out=out)


CASES = {
    "x rank": (lambda: ops.grouped_gram(X[0], OFFSETS), r"grouped_gram: x must have 2 dimensions.*\[4\]"),
    "x dtype": (lambda: ops.grouped_gram(X.int(), OFFSETS), "x is int32 but float32"),
    "x stride": (lambda: ops.grouped_gram(X.T, i32(0, 4)), "x must be contiguous in its last.*stride 4"),
    "offsets dtype": (lambda: ops.grouped_gram(X, OFFSETS.long()), r"offsets must be int32 .*\.int\(\)"),
    "offsets rank": (lambda: ops.grouped_gram(X, OFFSETS[None]), r"offsets must have shape \[experts \+ 1\]"),
    "offsets empty": (lambda: ops.grouped_gram(X, i32()), r"offsets must have shape \[experts \+ 1\].*\[0\]"),
    "offsets stride": (lambda: ops.grouped_gram(X, i32(0, 9, 2, 9)[::2]), "offsets must be contiguous"),
    "offsets fall": (lambda: ops.grouped_gram(X, i32(0, 3, 2)), r"offsets\[2\] is 2 but must be from 3 to the 6 tokens"),
    "offsets too great": (lambda: ops.grouped_gram(X, i32(0, 7)), r"offsets\[1\] is 7 but must be from 0 to the 6"),
    "offsets negative": (lambda: ops.grouped_gram(X, i32(-1, 6)), r"offsets\[0\] is -1"),
    "beta alone": (lambda: ops.grouped_gram(X, OFFSETS, beta=0.5), "beta is 0.5 but there is no out"),
    "out dtype": (lambda: gram_into(torch.zeros(2, 4, 4).double()), "out is float64 but must be float32"),
    "out shape": (lambda: gram_into(torch.zeros(3, 4, 4)), r"out must have shape \[2, 4, 4\] but has \[3, 4, 4\]"),
    "out stride": (lambda: gram_into(torch.zeros(2, 4, 8)[..., ::2]), "out must be contiguous"),
    "basis shape": (lambda: update(basis=BASIS[:1]), r"basis must have shape \[2, 4, rank\] but has \[1, 4, 3\]"),
    "basis rank": (lambda: update(basis=torch.zeros(2, 4, 5)), "basis has rank 5, above the dimension 4"),
    "basis dtype": (lambda: update(basis=BASIS.half()), "basis must be float32 or float64"),
    "discarded": (lambda: update(discarded=torch.zeros(3)), r"discarded must be torch.float32 \[2\]"),
    "update offsets": (lambda: update(offsets=i32(0, 4, 3)), r"offsets\[2\] is 3 but must be from 4 to the 6"),
    "update x": (lambda: update(x=X[0]), "x must have 2 dimensions"),
    "g": (lambda: variance(g=G[:5]), r"kron_variance: g must have shape \[6, classes, outputs\]"),
    "example": (lambda: variance(example=EXAMPLE[:5]), r"example must have shape \[6\]"),
    "factor": (lambda: variance(fa=factor(3, 2)), r"input_factor must have vectors \[2, 4, at most 4\]"),
    "factor experts": (lambda: variance(fb=factor(3, 2, 1)), r"output_factor must have vectors \[2, 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    call, message = CASES[case]
    with pytest.raises(REFUSED, match=message) as error:
        call()
    assert "effcore." in str(error.value)


def test_a_refused_call_leaves_out_alone():
    out = torch.ones(2, 4, 4)
    with pytest.raises(REFUSED):
        ops.grouped_gram(X, i32(0, 3, 2), out=out)
    assert torch.equal(out, torch.ones(2, 4, 4))


def test_no_gradient_is_lost_without_a_word():
    with pytest.raises(RuntimeError, match=r"grouped_gram: not differentiable; call it under torch\.no_grad"):
        ops.grouped_gram(X.clone().requires_grad_(), OFFSETS)
