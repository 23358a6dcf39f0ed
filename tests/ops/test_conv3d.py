"""The cross-shaped 3D convolution against the reference: forward and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcore.ops import conv3d as ops
from effcore.reference import conv3d as ref
from tests.support import assert_accurate, poisoned_memory

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ("channels last", "sliced", "channels first", "expanded")
CHANNELS = [1, 2, 3, 7, 16, 17, 31, 33, 64, 70]
NAMES = ("out", "dx", "dspatial", "dtemporal", "dbias")


def voxels(batch, channels, size, dtype, layout="channels last"):
    """Random [B, C, T, H, W] in memory orders that models produce."""
    if layout == "sliced":  # a part of the channels, an odd offset
        return torch.randn(batch, *size, channels + 3).to(dtype)[..., 1 : channels + 1].movedim(-1, 1)
    if layout == "expanded":
        return torch.randn(1, *size, channels).to(dtype).movedim(-1, 1).expand(batch, -1, -1, -1, -1)
    x = torch.randn(batch, channels, *size).to(dtype)
    return x if layout == "channels first" else x.contiguous(memory_format=torch.channels_last_3d)


def kernels(outputs, channels, kernel, dtype, bias=True):
    scale = (channels * (kernel[0] + kernel[1] * kernel[2])) ** -0.5
    made = [torch.randn(outputs, channels, *kernel[1:]) * scale, torch.randn(outputs, channels, kernel[0]) * scale]
    return [t.to(dtype) for t in [*made, *([torch.randn(outputs)] if bias else [])]]


def results(function, tensors, gradient, **options):
    """The output and the gradients of all tensors."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype).expand(out.shape))]


def check(tensors, gradient, **options):
    with poisoned_memory():
        ours = results(ops.cross_conv3d, tensors, gradient, **options)
    same = results(ref.cross_conv3d, tensors, gradient, **options)
    gradient = gradient.to(tensors[0].dtype).double()
    exact = results(ref.two_branches, [t.double() for t in tensors], gradient, **options)
    assert ours[0].is_contiguous(memory_format=torch.channels_last_3d)
    for name, a, b, c in zip(NAMES, ours, same, exact, strict=False):
        # Where no product is rounded to 16 bits, what is left is the order of some hundred additions.
        terms = 0.0 if a.dtype.itemsize == 2 or not c.numel() else 2 * c.abs().max().item()
        assert_accurate(a, b, c, what=name, terms=terms)


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kernel = [draw(st.sampled_from([1, 3, 3, 5])) for _ in range(3)]
    stride = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(3))
    padding = draw(st.one_of(st.just("same"), st.tuples(*(st.integers(0, 3) for _ in range(3)))))
    pad = [k // 2 for k in kernel] if padding == "same" else padding
    size = [max(draw(st.integers(1, 9)), k - 2 * p, 1) for k, p in zip(kernel, pad, strict=True)]
    channels, outputs = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    dtype = draw(st.sampled_from(DTYPES))
    x = voxels(draw(st.integers(0, 3)), channels, size, dtype, draw(st.sampled_from(LAYOUTS)))
    tensors = [x, *kernels(outputs, channels, kernel, dtype, draw(st.booleans()))]
    return tensors, {"stride": stride, "padding": padding}


@given(problems())
def test_against_the_reference(problem):
    tensors, options = problem
    check(tensors, torch.randn(ref.cross_conv3d(*tensors, **options).shape), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "channels, outputs, size, stride",
    [
        (64, 64, (5, 28, 28), 1),  # several blocks in a plane
        (130, 257, (4, 14, 14), 1),  # several chunks of the depth, several panels
        (96, 40, (4, 13, 15), 2),
        (3, 24, (3, 33, 31), (1, 2, 2)),
    ],
)
def test_shapes_of_networks(dtype, channels, outputs, size, stride):
    tensors = [voxels(2, channels, size, dtype), *kernels(outputs, channels, (3, 3, 3), dtype)]
    check(tensors, torch.randn(ref.cross_conv3d(*tensors, stride=stride).shape), stride=stride)


def test_the_reference_is_the_sum_of_two_convolutions():
    for stride, padding in [(1, "same"), (2, (0, 1, 2)), ((2, 1, 3), (1, 0, 0))]:
        tensors = [voxels(2, 3, (5, 7, 6), torch.float64), *kernels(4, 3, (3, 5, 3), torch.float64)]
        torch.testing.assert_close(
            ref.cross_conv3d(*tensors, stride=stride, padding=padding),
            ref.two_branches(*tensors, stride=stride, padding=padding),
        )


@pytest.mark.parametrize("stride, padding", [(1, "same"), ((1, 2, 3), "same"), (2, (0, 2, 1))])
def test_gradcheck(stride, padding):
    x = voxels(2, 3, (3, 4, 5), torch.float64).requires_grad_()
    weights = [t.requires_grad_() for t in kernels(2, 3, (3, 3, 3), torch.float64)]
    call = lambda *t: ops.cross_conv3d(*t, stride=stride, padding=padding)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *weights))


def test_autocast():
    tensors = [voxels(1, 16, (3, 6, 5), torch.float32), *kernels(8, 16, (3, 3, 3), torch.float32)]
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.cross_conv3d(*leaves)
    plain = ops.cross_conv3d(*(t.bfloat16() for t in tensors))
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_only_some_gradients_are_wanted():
    x, (spatial, temporal) = voxels(1, 4, (3, 4, 4), torch.float32), kernels(5, 4, (3, 3, 3), torch.float32, bias=False)
    whole = results(ops.cross_conv3d, [x, spatial, temporal], torch.ones(()))
    for wanted in range(3):
        leaves = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate((x, spatial, temporal))]
        ops.cross_conv3d(*leaves).sum().backward()
        assert torch.equal(leaves[wanted].grad, whole[1 + wanted])
        assert all(t.grad is None for i, t in enumerate(leaves) if i != wanted)


def test_kernels_have_any_strides():
    x, weights = voxels(2, 17, (3, 5, 6), torch.float32), kernels(20, 17, (3, 3, 3), torch.float32)
    dense = ops.cross_conv3d(x, *weights)
    spatial = weights[0].contiguous(memory_format=torch.channels_last)
    temporal = weights[1].transpose(0, 2).contiguous().transpose(0, 2)
    bias = weights[2][:, None].expand(-1, 2).contiguous()[:, 0]
    assert torch.equal(ops.cross_conv3d(x, spatial, temporal, bias), dense)


def test_infinities_and_nan_stay_where_they_belong():
    x, weights = voxels(1, 8, (5, 9, 9), torch.float32), kernels(8, 8, (3, 3, 3), torch.float32)
    clean = ops.cross_conv3d(x, *weights)
    x[0, 3, 2, 4, 4] = torch.nan
    out = ops.cross_conv3d(x, *weights)
    spoilt = out.isnan().all(1)[0]
    assert spoilt.sum() == 11 and torch.equal(out.isnan().any(1)[0], spoilt)
    assert torch.equal(out[:, :, ~spoilt], clean[:, :, ~spoilt])


def test_threads_do_not_change_the_result():
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [voxels(2, 32, (4, 20, 20), dtype), *kernels(48, 32, (3, 3, 3), dtype)]
        gradient = torch.randn(2, 48, 4, 20, 20)
        before = torch.get_num_threads()
        try:
            runs = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                # dbias is torch's own sum
                runs.append(results(ops.cross_conv3d, tensors[:3], gradient))
        finally:
            torch.set_num_threads(before)
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def test_offsets_beyond_two_to_the_31():
    # Only a few pages of each frame are touched: the strides, not the memory, are large.
    stride = 2**30 + 8
    storage = torch.empty(3 * stride, dtype=torch.bfloat16)
    big = storage.as_strided((1, 8, 3, 4, 5), (0, 1, stride, 40, 8))
    big.copy_(torch.randn(1, 8, 3, 4, 5))
    weights = kernels(6, 8, (3, 3, 3), torch.bfloat16)
    gradient = torch.randn(1, 6, 3, 4, 5)
    small = big.contiguous(memory_format=torch.channels_last_3d)
    ours = torch.ops.effcore.cross_conv3d(big, *weights, [1] * 3, [1] * 3)
    assert torch.equal(ours, torch.ops.effcore.cross_conv3d(small, *weights, [1] * 3, [1] * 3))
    parts = torch.ops.effcore.cross_conv3d_bwd_weight(big, gradient.bfloat16(), [3] * 3, [1] * 3, [1] * 3, False)
    for a, b in zip(
        parts,
        torch.ops.effcore.cross_conv3d_bwd_weight(small, gradient.bfloat16(), [3] * 3, [1] * 3, [1] * 3, False),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_gradients_lie_in_memory_like_the_kernels():
    x = torch.randn(2, 8, 3, 5, 4).contiguous(memory_format=torch.channels_last_3d)
    weights = kernels(6, 8, (3, 3, 5), torch.float32)[:2]
    found = []
    for inside in (False, True):
        leaves = [w.movedim(1, -1).contiguous().movedim(-1, 1) if inside else w.contiguous() for w in weights]
        leaves = [w.detach().requires_grad_() for w in leaves]
        gradients = torch.autograd.grad(ops.cross_conv3d(x, *leaves).square().sum(), leaves)
        assert [g.stride() for g in gradients] == [w.stride() for w in leaves]
        found.append(gradients)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_copy_into_channels_last_is_told_once():
    x, weights = torch.randn(1, 3, 3, 4, 4), kernels(2, 3, (3, 3, 3), torch.float32)
    ops._told = False
    with pytest.warns(UserWarning, match="not in channels_last_3d"):
        ops.cross_conv3d(x, *weights)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.cross_conv3d(x, *weights)
