"""The matrix products of every instruction set that this machine has, not of its best alone."""

import os
import subprocess
import sys

import pytest
import torch

from effcore import _core
from effcore.ops import attention, conv3d, kronecker, lowrank
from effcore.reference import attention as attention_reference
from effcore.reference import conv3d as conv3d_reference
from effcore.reference import kronecker as kronecker_reference
from effcore.reference import lowrank as lowrank_reference
from tests.support import assert_accurate

LEVELS = ("v2", "v3", "v4", "bf16", "amx")
BEST = _core.build_info()["isa"]


@pytest.mark.parametrize("isa", LEVELS[: LEVELS.index(BEST) + 1] if BEST in LEVELS else (BEST,))
def test_products_of(isa):
    done = subprocess.run(
        [sys.executable, "-m", __name__, isa], env=os.environ | {"EFFCORE_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def check(dtype):
    """Sizes that are no multiple of a tile, of a vector or of a pair."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def compare(name, op, reference, tensors, terms):
        tensors = [t.to(dtype) for t in tensors]
        results = []
        for function, to in ((op, dtype), (reference, dtype), (reference, torch.float64)):
            leaves = [t.detach().to(to, copy=True).requires_grad_() for t in tensors]
            out = function(*leaves)
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(to)
            results.append([out, *torch.autograd.grad(out, leaves, weights)])
        for i, (ours, same, exact) in enumerate(zip(*results, strict=True)):
            assert_accurate(ours, same, exact, what=f"{name} {dtype}, result {i}", terms=terms)

    q, k, v = torch.randn(2, 4, 67, 33), torch.randn(2, 2, 67, 33), torch.randn(2, 2, 67, 50)
    compare("attention", attention.attention, attention_reference.attention, (q, k, v), 1.0)
    x = torch.randn(2, 13, 3, 7, 9).to(memory_format=torch.channels_last_3d)
    kernels = torch.randn(19, 13, 3, 3) / 10, torch.randn(19, 13, 3) / 5
    compare("cross_conv3d", conv3d.cross_conv3d, conv3d_reference.cross_conv3d, (x, *kernels), 1.0)
    for rows in (1, 3, 16):
        factors = torch.randn(rows, 101), torch.randn(35, 101) / 10, torch.randn(67, 35) / 6
        compare("lowrank_linear", lowrank.lowrank_linear, lowrank_reference.lowrank_linear, factors, 4.0)
    tokens, offsets = torch.randn(301, 75).to(dtype), torch.tensor([0, 7, 7, 301], dtype=torch.int32)
    gram, same = kronecker.grouped_gram(tokens, offsets), kronecker_reference.grouped_gram(tokens, offsets)
    exact = kronecker_reference.grouped_gram(tokens.double(), offsets)
    assert gram.dtype == wide
    assert_accurate(gram, same, exact, what=f"grouped_gram {dtype}", terms=exact.abs().max().item())


if __name__ == "__main__":
    assert _core.build_info()["isa"] == sys.argv[1]
    for each in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        check(each)
