"""A bad argument is an exception that names the argument, what was expected and what came."""

import math

import pytest
import torch

from effcore.ops import routing as ops
from tests.support import REFUSED

X, A, B = torch.randn(2, 6, 8), torch.randn(2, 4, 8), torch.randn(2, 2, 8)
Q, K = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8)
SCORES = torch.randn(2, 6)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32).expand(2, -1)


IA, IB = i32(0, 2, 3, 5), i32(1, 4)

ORDER = torch.arange(6, dtype=torch.int32)

CASES = {
    "permute rank": (lambda: ops.permute_tokens(X, ORDER, ORDER), r"permute_tokens: x must be \[N, C\].*\[N\], got \(2, 6"),
    "permute list": (lambda: ops.permute_tokens(X[0], ORDER[:5], ORDER), r"order and inverse \[N\].*\(5,\)"),
    "permute dtype": (lambda: ops.permute_tokens(X[0], ORDER, ORDER.long()), "inverse must be int32, got torch.int64"),
    "permute sizes": (lambda: ops.permute_tokens(X[0], ORDER, ORDER, [2, 3]), r"sizes must sum up to 6, got \[2, 3\]"),
    "keep negative": (lambda: ops.partition_tokens(SCORES, -1), "partition_tokens: keep must be from 0 to the 6.*got -1"),
    "keep too great": (lambda: ops.partition_tokens(SCORES, 7), "keep must be from 0 to the 6.*got 7"),
    "protect": (lambda: ops.partition_tokens(SCORES, 2, protect=3), r"protect must be from 0 to keep \(2\), got 3"),
    "protect negative": (lambda: ops.partition_tokens(SCORES, 2, protect=-1), "protect must be.*-1"),
    "scores rank": (lambda: ops.partition_tokens(X, 2), r"scores must have 2 dimensions.*\[2, 6, 8\]"),
    "scores dtype": (lambda: ops.partition_tokens(SCORES.int(), 2), "scores is int32 but float32"),
    "scores stride": (lambda: ops.partition_tokens(torch.randn(6, 2).T, 2), "scores must be contiguous in its last"),
    "queries": (lambda: ops.class_scores(Q.expand(-1, -1, 3, -1), K), "class_scores: q must hold one query.*got 3"),
    "heads": (lambda: ops.class_scores(Q, K[:, :1].expand(-1, 3, -1, -1)), "q has 4 heads.*multiple of the 3"),
    "head_dim": (lambda: ops.class_scores(Q, K[..., :7]), "k has head dimension 7 but q has 8"),
    "scale": (lambda: ops.class_scores(Q, K, math.nan), "scale must be finite"),
    "score keep": (lambda: ops.score_partition(Q, K, 9), "score_partition: keep must be.*got 9"),
    "x rank": (lambda: ops.gather_tokens(SCORES, IA), r"gather_tokens: x must have 3 dimensions"),
    "index dtype": (lambda: ops.gather_tokens(X, IA.long()), r"index must be int32 .*\.int\(\)"),
    "index batch": (lambda: ops.gather_tokens(X, IA[:1]), r"index must have shape \[2, "),
    "index range": (lambda: ops.gather_tokens(X, i32(0, 6)), r"index\[0, 1\] is 6 but there are 6 tokens"),
    "index negative": (lambda: ops.gather_tokens(X, i32(-1)), r"index\[0, 0\] is -1"),
    "x stride": (lambda: ops.gather_tokens(X.transpose(1, 2), IA), "x must be contiguous in its last dimension"),
    "merge repeated": (lambda: ops.merge_tokens(A, IA, B, i32(1, 5)), r"index_b\[0, 1\] is 5, which .* already"),
    "merge range": (lambda: ops.merge_tokens(A, IA, B, i32(1, 9)), r"index_b\[0, 1\] is 9 but there are 6"),
    "merge sizes": (lambda: ops.merge_tokens(A, IA, B, i32(1)), "index_a and index_b name 4 and 1 tokens.*6"),
    "merge shape": (lambda: ops.merge_tokens(A, IB, B, IA), r"index_a must have shape \[2, 4\] but has \[2, 2\]"),
    "merge dtype": (lambda: ops.merge_tokens(A, IA, B.double(), IB), "b is float64 but must be float32"),
    "merge channels": (lambda: ops.merge_tokens(A, IA, B[..., :7], IB), r"b must have shape \[2, 2, 8\]"),
    "residual": (lambda: ops.merge_tokens(A, IA, B, IB, residual=A), r"residual must have shape \[2, 6, 8\]"),
    "residual_a": (lambda: ops.merge_tokens(A, IA, B, IB, residual_a=B), r"residual_a must have shape \[2, 4, 8\]"),
    "separate": (lambda: ops.separate_tokens(X, IA, IA), "index_a and index_b name 4 and 4"),
    "weight": (lambda: ops.gather_layer_norm(X, IA, torch.randn(7)), r"gather_layer_norm: weight must have shape \[8\]"),
    "weight dtype": (lambda: ops.gather_rms_norm(X, IA, torch.randn(8).half()), "weight is float16 but must be float32"),
    "eps": (lambda: ops.gather_rms_norm(X, IA, torch.randn(8), eps=-1.0), "eps must be finite and not negative, got -1"),
    "split": (lambda: ops.split_tokens(-1, attention_cost=(1, 1), ssm_cost=1), "length must not be negative"),
    "split cost": (lambda: ops.split_tokens(5, attention_cost=(1, math.nan), ssm_cost=1), r"attention_cost\[1\]"),
    "split free": (lambda: ops.split_tokens(5, attention_cost=(0, 0), ssm_cost=1), "both branches must cost"),
    "circulate": (lambda: ops.circulate(5, 6, 0), r"n must be from 0 to length \(5\), got 6"),
    "circulate block": (lambda: ops.circulate(5, 2, -1), "block must not be negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    call, message = CASES[case]
    with pytest.raises(REFUSED, match=message) as error:
        call()
    assert str(error.value).startswith("effcore.")


def test_scores_are_not_differentiable_and_indices_carry_no_gradient():
    q = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"class_scores: not differentiable; call it under torch.no_grad"):
        ops.class_scores(q, K)
    kept, rest = ops.score_partition(q, K, 3)
    assert not kept.requires_grad and not rest.requires_grad
    assert not ops.partition_tokens(SCORES.clone().requires_grad_(), 3)[0].requires_grad


def test_second_derivatives_are_refused():
    x = X.double().requires_grad_()
    (dx,) = torch.autograd.grad(ops.gather_tokens(x, IA).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()
