"""A bad argument is an exception that names the argument, what was expected and what came."""

import pytest
import torch

from effcore.ops import conv3d as ops
from tests.support import REFUSED

X = torch.randn(2, 4, 3, 6, 5).contiguous(memory_format=torch.channels_last_3d)
S, T, B = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3), torch.randn(8)
conv = ops.cross_conv3d
native = torch.ops.effcore
ONES = [1, 1, 1]

CASES = {
    "rank": (lambda: conv(X[0], S, T), r"x must have 5 dimensions.*\[4, 3, 6, 5\]"),
    "dtype": (lambda: conv(X.int(), S, T), "x is int32 but float32"),
    "no frames": (lambda: conv(X[:, :, :0], S, T), r"x has shape \[2, 4, 0, 6, 5\] but only the batch may be empty"),
    "spatial rank": (lambda: conv(X, T, T), r"spatial must have shape \[out_channels, in_channels, height, width\]"),
    "temporal rank": (lambda: conv(X, S, S), r"temporal must have shape \[out_channels, in_channels, frames\]"),
    "spatial dtype": (lambda: conv(X, S.double(), T), "spatial is float64 but must be float32"),
    "temporal dtype": (lambda: conv(X, S, T.half()), "temporal is float16 but must be float32"),
    "even": (lambda: conv(X, S[..., :2], T), r"spatial must have odd sizes.*\[8, 4, 3, 2\]"),
    "even in time": (lambda: conv(X, S, T[..., :2]), r"temporal must have an odd size.*\[8, 4, 2\]"),
    "outputs": (lambda: conv(X, S, T[:7]), "temporal has 7 output channels but spatial has 8"),
    "inputs": (lambda: conv(X, S, T[:, :3]), "temporal has 3 input channels but spatial has 4"),
    "groups": (lambda: conv(X, S[:, :2], T[:, :2]), "spatial has 2 input channels but x has 4 .groups are not"),
    "no outputs": (lambda: conv(X, S[:0], T[:0]), "spatial must have at least one output channel"),
    "bias": (lambda: conv(X, S, T, B[:7]), r"bias must have shape \[8\] but has \[7\]"),
    "bias dtype": (lambda: conv(X, S, T, B.double()), "bias is float64 but must be float32"),
    "stride": (lambda: conv(X, S, T, stride=0), r"stride must be positive, got \(0, 0, 0\)"),
    "strides": (lambda: conv(X, S, T, stride=(1, 2)), r"stride must be an int or 3 of them.*\(1, 2\)"),
    "padding": (lambda: conv(X, S, T, padding=(1, -1, 0)), r"padding must not be negative, got \(1, -1, 0\)"),
    "padding name": (lambda: conv(X, S, T, padding="valid"), "padding must be an int or 3 of them.*'valid'"),
    "kernel exceeds": (lambda: conv(X[:, :, :1], S, T, padding=0), r"x has \[1, 6, 5\].*kernel of \[3, 3, 3\] exceeds"),
    "native stride": (lambda: native.cross_conv3d(X, S, T, None, [1, 1], ONES), "stride must have 3 numbers"),
    "dout shape": (
        lambda: native.cross_conv3d_bwd_data(X, S[:4], T[:4], ONES, ONES, 3, 6, 6),
        r"dout must have shape \[2, 4, 3, 6, 6\] but has \[2, 4, 3, 6, 5\]",
    ),
    "size": (lambda: native.cross_conv3d_bwd_data(X, S[:4], T[:4], ONES, ONES, 3, 0, 5), "x must have a voxel"),
    "weight dout": (
        lambda: native.cross_conv3d_bwd_weight(X, X[:, :, :2], [3] * 3, ONES, ONES, False),
        r"dout must have shape \[2, 4, 3, 6, 5\] but has \[2, 4, 2, 6, 5\]",
    ),
    "weight kernel": (
        lambda: native.cross_conv3d_bwd_weight(X, X, [3, 2, 3], ONES, ONES, False),
        r"kernel must be odd.*3, 2, 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    call, message = CASES[case]
    with pytest.raises(REFUSED, match=message) as error:
        call()
    assert str(error.value).startswith("effcore.")


def test_the_meta_device_gives_shapes():
    out = conv(*(t.to("meta") for t in (X, S, T, B)), stride=(1, 2, 2))
    assert out.is_meta and out.shape == (2, 8, 3, 3, 3)


def test_second_derivatives_are_refused():
    x = X.double().requires_grad_()
    (dx,) = torch.autograd.grad(conv(x, S.double(), T.double()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()
