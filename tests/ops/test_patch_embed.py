"""Patch embeddings as one product: the op that reads patches where they lie (its CPU form gathers them) and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from effcore.ops import patch_embed
from effcore.ops.patch_embed import patch_embed3d

_op = torch.ops.effcore.patch_embed3d
KERNEL = (2, 3, 4)


def tensors(size=(4, 6, 8), dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    return [t.to(dtype) for t in (torch.randn(batch, 3, *size), torch.randn(5, 3, *KERNEL), torch.randn(5))]


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 8, 11), (2, 3, 4)])
@pytest.mark.parametrize("function", [patch_embed3d, patch_embed._in_place])
def test_equals_conv3d(function, size, batch):
    ours, theirs = tensors(size, batch=batch), tensors(size, batch=batch)
    for t in (*ours, *theirs):
        t.requires_grad_()
    out, exact = function(*ours), F.conv3d(*theirs, stride=KERNEL)
    torch.testing.assert_close(out, exact)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    gradient = torch.randn_like(exact)
    for a, b in zip(
        torch.autograd.grad(out, ours, gradient), torch.autograd.grad(exact, theirs, gradient), strict=True
    ):
        torch.testing.assert_close(a, b)


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


def test_compiles():
    x, weight, bias = (t.requires_grad_() for t in tensors())
    out = torch.compile(patch_embed._in_place, backend="aot_eager", fullgraph=True)(x, weight, bias)
    exact = F.conv3d(x, weight, bias, KERNEL)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weight)[0] for y in (out, exact)))


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
        (False, (3, 4, 32, 32), (8, 3, 1, 1, 16)),  # a depth of 48
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
    assert not patch_embed._reads_in_place(x[:1].expand(2, -1, -1, -1, -1), weight)
    for channels, served in ((2**30 - 48 * 32 * 2, True), (2**30, False)):  # coordinates of 32 bits
        far = torch.empty_strided(x.shape, (8, channels, 48 * 32, 48, 1), dtype=x.dtype, device="meta").as_subclass(
            Cuda
        )
        assert patch_embed._reads_in_place(far, weight) == served
    monkeypatch.setattr(patch_embed, "_has_kernel", lambda dtype: False)
    assert not patch_embed._reads_in_place(x, weight)
