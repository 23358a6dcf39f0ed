"""attention and its visibility rules against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from effcore import reference
from effcore.ops.attention import attention, attention_from_scores, attention_with_scores
from effcore.reference import attention as ref
from tests.support import LAYOUTS, assert_accurate, heads, poisoned_memory

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def problems(draw):
    """Shapes that kernels get wrong: empty, one token, odd, beyond a tile, queries more than keys, Dv other than D."""
    batch, kv_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens = st.sampled_from([0, 1, 2, 3, 7, 16, 31, 63, 64, 65, 100, 129, 200])
    queries, keys = draw(tokens), draw(tokens)
    dims = st.sampled_from([1, 2, 5, 8, 16, 33, 64, 80, 128, 256])
    head_dim, value_dim = draw(dims), draw(dims)
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    q = heads(batch, kv_heads * group, queries, head_dim, dtype, layout)
    k = heads(batch, kv_heads, keys, head_dim, dtype, draw(st.sampled_from(LAYOUTS)))
    v = heads(batch, kv_heads, keys, value_dim, dtype, layout)
    visibility = {"causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.3, -0.1, 0.0]))}
    if draw(st.booleans()):
        visibility["lengths"] = torch.randint(0, keys + 1, (batch,), dtype=torch.int32)
    if draw(st.booleans()):
        shape = (batch, queries) if draw(st.booleans()) else (batch,)
        first = torch.randint(0, keys + 1, shape, dtype=torch.int32)
        visibility["first_key"] = first.sort(-1).values if first.dim() == 2 else first
    return (q, k, v), visibility


def size(t):
    return t.abs().max().item() if t.numel() else 0.0


def gradient_terms(q, k, v, dout, scale):
    """The sizes of scale * P * dP * k (or q) and of P * dout: what dq, dk and dv are sums of."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dp = abs(scale) * size(dout.float()) * size(v.float()) * v.shape[-1] ** 0.5
    queries = max(q.shape[2], 1) ** 0.5
    return {"q": dp * size(k.float()), "k": dp * size(q.float()) * queries, "v": size(dout.float()) * queries}


def gradients(function, inputs, dout, visibility):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    out = function(*leaves, **visibility)
    return out, torch.autograd.grad(out, leaves, dout.to(out.dtype))


@given(problems())
def test_forward_and_backward_match_the_reference(problem):
    inputs, visibility = problem
    dout = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3]).to(inputs[0].dtype)
    with poisoned_memory():
        out, grads = gradients(attention, inputs, dout, visibility)
    same, same_grads = gradients(ref.attention, inputs, dout, visibility)
    exact, exact_grads = gradients(ref.attention, [t.double() for t in inputs], dout, visibility)
    assert_accurate(out, same, exact, what="out", terms=size(inputs[2].float()))
    terms = gradient_terms(*inputs, dout, visibility["scale"])
    for name, a, b, c in zip("qkv", grads, same_grads, exact_grads, strict=True):
        assert_accurate(a, b, c, what=f"d{name}", terms=terms[name])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("visibility", ["none", "lengths", "first_key", "window"])
def test_gradcheck(causal, visibility):
    batch, queries, keys = 2, 5, 7
    q, k, v = (
        heads(batch, 4, queries, 3, torch.float64),
        heads(batch, 2, keys, 3, torch.float64),
        heads(batch, 2, keys, 2, torch.float64),
    )
    options = {
        "none": {},
        "lengths": {"lengths": torch.tensor([7, 3], dtype=torch.int32)},
        "first_key": {"first_key": torch.tensor([0, 2], dtype=torch.int32)},
        "window": {"first_key": torch.arange(queries, dtype=torch.int32).expand(batch, -1).contiguous()},
    }[visibility]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *a: attention(*a, causal=causal, **options), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_sdpa_on_a_large_causal_problem(dtype):
    q, k, v = (heads(1, 4, 1000, 64, dtype, "token") for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert_accurate(attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True), exact)


@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 4), (1, 0, 4), (1, 3, 0)])
@pytest.mark.parametrize("keep", ["none", "lse", "probs"])
def test_expanded_gradients_of_nothing(batch, queries, keys, keep):
    q, k, v = (torch.randn(batch, 2, n, 8, requires_grad=True) for n in (queries, keys, keys))
    if keep == "none":
        outs = [attention(q, k, v)]
    else:
        out, (scores,) = attention_with_scores(q, k, v, keep=keep)
        outs = [out, attention_from_scores(scores, v)]
    sum(out.sum() for out in outs).backward()
    assert all((t.grad == 0).all() for t in (q, k, v))


def test_rows_that_see_no_key_are_zero_everywhere():
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    out = attention(q, k, v, causal=True, lengths=lengths)
    assert (out[0] == 0).all()
    assert (out[1, :, :2] == 0).all() and (out[1, :, 2:] != 0).all()
    out.square().sum().backward()
    assert (q.grad[0] == 0).all() and (q.grad[1, :, :2] == 0).all() and (k.grad[1, :, 4:] == 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))
    _, lse = torch.ops.effcore.attention(q, k, v, lengths, None, True, None)
    assert (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_inf_propagate_as_in_sdpa(dtype, value, where):
    tensors = {name: torch.randn(1, 2, 40, 16).to(dtype) for name in "qkv"}
    tensors[where][0, 1, 17, 3] = value
    got = attention(*tensors.values(), causal=True)
    expected = ref.attention(*(t.double() for t in tensors.values()), causal=True)
    sees = slice(17, 18) if where == "q" else slice(17, 40)  # rows before may or may not meet 0 * NaN, as in SDPA
    assert torch.equal(got[:, :, sees].isfinite(), expected[:, :, sees].isfinite())
    assert (got[0, 0] - expected[0, 0]).abs().max() < 0.05  # the other head is untouched


def test_invisible_keys_cannot_leak_even_if_nan():
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    lengths, first = torch.tensor([15], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    clean = attention(q, k, v, lengths=lengths, first_key=first)
    for t in (k, v):
        t[:, :, 15:] = float("nan")
        t[:, :, :4] = float("nan")
    assert torch.equal(attention(q, k, v, lengths=lengths, first_key=first), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_beyond_the_lengths_cannot_leak_where_first_key_is_beyond_them_too(dtype):
    q, k, v = (torch.randn(1, 2, 20, 16).to(dtype) for _ in range(3))
    lengths = torch.tensor([7], dtype=torch.int32)
    first = torch.arange(20, dtype=torch.int32)[None]
    clean = gradients(attention, (q, k, v), torch.ones_like(q), {"lengths": lengths, "first_key": first})
    for t in (k, v):
        t[:, :, 7:] = float("nan")
    dirty = gradients(attention, (q, k, v), torch.ones_like(q), {"lengths": lengths, "first_key": first})
    assert torch.equal(dirty[0], clean[0]) and (dirty[0][:, :, 7:] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(dirty[1], clean[1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["none", "lse", "probs"])
def test_rows_that_see_no_key_are_zero_beside_rows_that_see_nan(dtype, keep):
    q, k, v = (torch.randn(1, 2, 40, 16).to(dtype).requires_grad_() for _ in range(3))
    with torch.no_grad():
        k[:, :, 5], v[:, :, 6] = float("nan"), float("inf")
    first = torch.tensor([[0] * 15 + [40] * 25], dtype=torch.int32)
    if keep == "none":
        outs = [attention(q, k, v, first_key=first)]
    else:
        out, (scores,) = attention_with_scores(q, k, v, keep=keep, first_key=first)
        outs = [out, attention_from_scores(scores, v)]
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    for rows in (*outs, q.grad):
        assert rows[:, :, :15].isnan().all() and (rows[:, :, 15:] == 0).all()


def test_packed_documents_equal_separate_ones():
    sizes = [5, 1, 30, 64]
    q, k, v = (torch.randn(1, 2, sum(sizes), 32) for _ in range(3))
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    first = torch.repeat_interleave(starts, torch.tensor(sizes)).to(torch.int32)[None]
    packed = attention(q, k, v, causal=True, first_key=first)
    apart = torch.cat(
        [attention(*(t[:, :, s : s + n] for t in (q, k, v)), causal=True) for s, n in zip(starts, sizes, strict=True)],
        2,
    )
    torch.testing.assert_close(packed, apart)


def test_memory_order_follows_the_queries():
    head, token = (heads(2, 4, 33, 16, torch.float32, layout) for layout in ("head", "token"))
    assert attention(head, head, head).is_contiguous()
    out = attention(token, token, token)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, attention(*(token.contiguous(),) * 3))


def test_two_runs_give_identical_bits():
    q, k, v = (heads(2, 4, 300, 64, torch.bfloat16) for _ in range(3))
    runs = [gradients(attention, (q, k, v), torch.ones_like(q), {"causal": True}) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_threads_do_not_change_the_result():
    q, k, v = (heads(1, 3, 500, 64, torch.float32) for _ in range(3))
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(gradients(attention, (q, k, v), torch.ones_like(q), {"causal": True}))
    finally:
        torch.set_num_threads(before)
    for out, grads in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
        for a, b in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_two_to_the_31():
    # Only one page of each row is touched: the strides, not the memory, are large.
    rows, stride = 3, 2**30 + 8
    storage = torch.empty(rows * stride, dtype=torch.bfloat16)
    big = storage.as_strided((rows, 1, 9, 16), (stride, 16 * 9, 16, 1))
    big.copy_(torch.randn(rows, 1, 9, 16))
    torch.testing.assert_close(attention(big, big, big), attention(*(big.clone(),) * 3))


def test_autocast_casts_as_torch_does():
    q, k, v = (torch.randn(1, 2, 10, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_inference_mode_and_no_grad():
    q = torch.randn(1, 2, 10, 8, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not attention(q, q, q).requires_grad


def test_second_derivative_is_refused():
    q, k, v = (torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dq.sum().backward()


def test_reference_is_the_textbook():
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(
        reference.attention.attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
