"""Patch embeddings as one product: the op that reads patches where they lie (its CPU form gathers them) and its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effcore.nn.conv3d import PatchEmbed3d
from effcore.ops import patch_embed
from effcore.ops.patch_embed import patch_embed3d
from effcore.reference import conv3d as ref
from tests.ops.test_conv3d import LAYOUTS, results, voxels
from tests.support import assert_accurate, poisoned_memory

_op = torch.ops.effcore.patch_embed3d
KERNEL = (2, 3, 4)


def tensors(size=(4, 6, 8), dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    return [t.to(dtype) for t in (torch.randn(batch, 3, *size), torch.randn(5, 3, *KERNEL), torch.randn(5))]


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kernel = [draw(st.sampled_from([1, 2, 3, 4])) for _ in range(3)]
    size = [k * draw(st.integers(1, 3)) + draw(st.integers(0, k - 1)) for k in kernel]
    channels, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from(patch_embed.DTYPES))
    x = voxels(draw(st.integers(0, 3)), channels, size, dtype, draw(st.sampled_from(LAYOUTS)))
    weight = torch.randn(outputs, channels, *kernel).to(dtype) * (channels * math.prod(kernel)) ** -0.5
    return [x, weight, *([torch.randn(outputs).to(dtype)] if draw(st.booleans()) else [])]


@pytest.mark.parametrize("function", [patch_embed3d, lambda x, w, b=None: patch_embed._in_place(x, w, b)])
@given(tensors=problems())
def test_against_the_reference(function, tensors):
    gradient = torch.randn(ref.patch_embed3d(*tensors).shape).to(tensors[0].dtype)
    with poisoned_memory():
        ours = results(function, tensors, gradient)
    same, exact = (
        results(ref.patch_embed3d, tensors, gradient),
        results(ref.patch_embed3d, [t.double() for t in tensors], gradient),
    )
    assert ours[0].is_contiguous(memory_format=torch.channels_last_3d)
    for name, a, b, c in zip(("out", "dx", "dweight", "dbias"), ours, same, exact, strict=False):
        # Where no product is rounded to 16 bits, what is left is the order of some hundred additions.
        terms = 0.0 if a.dtype.itemsize == 2 or not c.numel() else 2 * c.abs().max().item()
        assert_accurate(a, b, c, what=name, terms=terms)


def test_voxels_have_any_strides():
    x, weight, bias = tensors(dtype=torch.float32)
    dense = patch_embed3d(x, weight, bias)
    for mixed in (x.transpose(1, 4).contiguous().transpose(1, 4), x.repeat_interleave(2, -1)[..., ::2]):
        assert torch.equal(patch_embed3d(mixed, weight, bias), dense)
    padded = torch.nn.functional.pad(x.flatten(1), (0, 1))[:, :-1].view_as(x)  # clips that begin at odd places
    for batch in (0, 1, 2):
        assert torch.equal(patch_embed3d(padded[:batch], weight, bias), dense[:batch])
    weight = weight.transpose(0, 4).contiguous().transpose(0, 4)
    assert torch.equal(patch_embed3d(x, weight, bias[:, None].expand(-1, 2).contiguous()[:, 0]), dense)


X, W, B = tensors(dtype=torch.float32)
CASES = {
    "rank": (lambda f: f(X[0], W, B), r"x must have 5 dimensions \[batch, channels, frames.*has shape \[3, 4, 6, 8\]"),
    "dtype": (lambda f: f(X.int(), W, B), "x is int32 but float32, bfloat16, float16, float64 are supported"),
    "weight rank": (lambda f: f(X, W[0], B), r"weight must have shape \[out_channels.*but has \[3, 2, 3, 4\]"),
    "weight dtype": (lambda f: f(X, W.double(), B), "weight is float64 but must be float32"),
    "bias dtype": (lambda f: f(X, W, B.half()), "bias is float16 but must be float32"),
    "weight device": (lambda f: f(X, W.to("meta"), B), "weight is on meta but the others are on cpu"),
    "empty": (lambda f: f(X, W[:0], B[:0]), r"weight must not be empty but has shape \[0, 3, 2, 3, 4\]"),
    "groups": (lambda f: f(X, W[:, :1], B), "weight has 1 input channels but x has 3 .groups are not"),
    "no patch": (lambda f: f(X[:, :, :1], W, B), r"x of shape \[2, 3, 1, 6, 8\] holds no patch.*\[5, 3, 2, 3, 4\]"),
    "bias": (lambda f: f(X, W, B[:4]), r"bias must have shape \[5\] but has \[4\]"),
    "bias rank": (lambda f: f(X, W, B[None]), r"bias must have shape \[5\] but has \[1, 5\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    call, message = CASES[case]
    for function in (patch_embed3d, _op):
        if case == "weight device" and function is _op:
            continue  # the dispatcher takes it for the fake's
        with pytest.raises(ValueError, match=message) as error:
            call(function)
        assert str(error.value).startswith("effcore.patch_embed3d: ")


def test_gradients():
    x, weight, bias = (t.requires_grad_() for t in tensors((3, 3, 9)))
    assert torch.autograd.gradcheck(patch_embed._in_place, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: patch_embed._in_place(x, w, None), (x, weight))


def test_second_derivatives_are_refused():
    x, weight, bias = (t.requires_grad_() for t in tensors())
    (gradient,) = torch.autograd.grad(patch_embed._in_place(x, weight, bias).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, weight, b = (t.requires_grad_() for t in tensors(dtype=torch.float32))
    torch.library.opcheck(_op.default, (x, weight, b if bias else None))


def test_flops_are_those_of_the_convolution():
    x, weight, bias = tensors()
    with FlopCounterMode(display=False) as ours:
        patch_embed._in_place(x, weight, bias)
    with FlopCounterMode(display=False) as theirs:
        F.conv3d(x, weight, bias, KERNEL)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.parametrize("function", [patch_embed3d, patch_embed._in_place])
def test_fullgraph_gives_the_same_numbers(function):
    torch._dynamo.reset()
    inputs = [t.requires_grad_() for t in tensors()]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    outs = [
        (out, *torch.autograd.grad(out.square().sum(), inputs)) for out in (f(*inputs) for f in (function, compiled))
    ]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


def test_dynamic_sizes_take_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = PatchEmbed3d(5, 6, KERNEL)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for size in ((8, 9, 16), (10, 12, 20), (12, 21, 24)):
        x = torch.randn(7, 5, *size)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_the_meta_device_gives_shapes():
    out = patch_embed3d(*(t.to("meta") for t in (X, W, B)))
    assert out.is_meta and out.shape == (2, 5, 2, 2, 2) and out.is_contiguous(memory_format=torch.channels_last_3d)


def test_autocast():
    x, weight, bias = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = patch_embed3d(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.conv3d(x, weight, bias, KERNEL), rtol=0.02, atol=0.1)


class Cuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("served", "shape", "kernel"),
    [
        (True, (3, 4, 32, 48), (8, 3, 2, 16, 16)),
        (True, (3, 4, 64, 64), (8, 3, 1, 32, 32)),
        (True, (3, 4, 64, 64), (8, 3, 1, 2, 64)),
        (False, (3, 4, 28, 28), (8, 3, 2, 14, 14)),  # lines that the copy engine does not take
        (False, (3, 4, 32, 36), (8, 3, 2, 16, 16)),  # that begin anywhere
        (True, (3, 4, 32, 32), (8, 3, 1, 1, 16)),  # a depth of 48
        (False, (3, 4, 32, 32), (12, 3, 2, 16, 16)),
    ],
)
def test_which_patches_are_read_in_place(monkeypatch, served, shape, kernel):
    monkeypatch.setattr(patch_embed, "_has_kernel", lambda dtype: True)
    x = torch.empty(2, *shape, dtype=torch.bfloat16).as_subclass(Cuda)
    weight = torch.empty(kernel, dtype=torch.bfloat16)
    assert patch_embed._reads_in_place(x, weight) == served


def test_which_clips_are_gathered_first(monkeypatch):
    monkeypatch.setattr(patch_embed, "_has_kernel", lambda dtype: True)
    x = torch.empty(2, 3, 4, 32, 48, dtype=torch.bfloat16).as_subclass(Cuda)
    weight = torch.empty(8, 3, 2, 16, 16, dtype=torch.bfloat16)
    assert patch_embed._reads_in_place(x, weight) and patch_embed._reads_in_place(x[1:], weight)
    assert not patch_embed._reads_in_place(x, weight.half())
    assert not patch_embed._reads_in_place(x.transpose(-1, -2), weight)
    assert not patch_embed._reads_in_place(x[..., 1:], weight)
    assert not patch_embed._reads_in_place(x.float(), weight.float())
    assert not patch_embed._reads_in_place(x[0], weight) and not patch_embed._reads_in_place(x, weight[0])
    assert not patch_embed._reads_in_place(x[:1].expand(2, -1, -1, -1, -1), weight)
    for channels, served in ((2**30 - 48 * 32 * 2, True), (2**30, False)):  # coordinates of 32 bits
        far = torch.empty_strided(x.shape, (8, channels, 48 * 32, 48, 1), dtype=x.dtype, device="meta").as_subclass(
            Cuda
        )
        assert patch_embed._reads_in_place(far, weight) == served
    monkeypatch.setattr(patch_embed, "_has_kernel", lambda dtype: False)
    assert not patch_embed._reads_in_place(x, weight)
