"""Token movement against the reference: forward, backward, selection, planners."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcore.ops import routing as ops
from effcore.reference import routing as ref
from tests.support import assert_accurate, poisoned_memory, rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ("plain", "sliced", "expanded", "token-major")
INT = torch.int32


def random_partition(batch, tokens, keep):
    if batch == 0 or tokens == 0:
        return torch.empty(batch, keep, dtype=INT), torch.empty(batch, tokens - keep, dtype=INT)
    return ref.partition_tokens(torch.rand(batch, tokens), keep)


@st.composite
def shapes(draw):
    batch, tokens = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 3, 7, 17, 64, 197, 300]))
    keep = draw(st.integers(0, tokens))
    channels = draw(st.sampled_from([0, 1, 2, 3, 8, 17, 33, 64, 100, 385]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return batch, tokens, keep, channels, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))


def results(function, leaves, grads):
    """Outputs and the gradients of all leaves."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gradients = torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
    return [*outs, *gradients]


# ---------------------------------------------------------------- movement


@given(shapes())
def test_separate_and_merge(shape):
    batch, tokens, keep, channels, dtype, layout = shape
    index_a, index_b = random_partition(batch, tokens, keep)
    x = rows(batch, tokens, channels, dtype, layout)
    grads = [torch.randn(batch, n, channels) for n in (keep, tokens - keep)]
    with poisoned_memory():
        ours = results(lambda x: ops.separate_tokens(x, index_a, index_b), [x], grads)
    for a, b in zip(ours, results(lambda x: ref.separate_tokens(x, index_a, index_b), [x], grads), strict=True):
        assert torch.equal(a, b)
    assert all(t.is_contiguous() for t in ours)
    with poisoned_memory():
        back = results(lambda a, b: ops.merge_tokens(a, index_a, b, index_b), ours[:2], [grads_of(x)])
    assert torch.equal(back[0], x)


@pytest.mark.parametrize("kind", ["shuffled", "all of the first list before the second"])
def test_lists_in_any_order(kind):
    """Each thread takes a share of both lists: of large rows, and wherever their tokens are."""
    batch, tokens, keep = 3, 211, 64
    order = torch.arange(tokens).expand(batch, -1)
    if kind == "shuffled":
        order = torch.rand(batch, tokens).argsort(1)
    index_a, index_b = order[:, :keep].int(), order[:, keep:].int()
    x = torch.randn(batch, tokens, 257)
    with poisoned_memory():
        a, b = ops.separate_tokens(x, index_a, index_b)
        merged = ops.merge_tokens(a, index_a, b, index_b, residual=x)
    assert torch.equal(a, ref.gather_tokens(x, index_a)) and torch.equal(b, ref.gather_tokens(x, index_b))
    assert torch.equal(merged, 2 * x)


def grads_of(x):
    return torch.randn(x.shape)


@given(shapes())
def test_permute_and_cut(shape):
    _, tokens, keep, channels, dtype, layout = shape
    order = torch.randperm(tokens)
    lists = order.int(), order.argsort().int()
    x = rows(1, tokens, channels, dtype, layout)[0]
    grads = [torch.randn(n, channels).to(dtype) for n in (keep, tokens - keep)]
    with poisoned_memory():
        a, b, dx = results(lambda x: ops.permute_tokens(x, *lists, [keep, tokens - keep]), [x], grads)
        (back,) = ops.permute_tokens(torch.cat([a, b]), *lists[::-1])
    assert torch.equal(torch.cat([a, b]), x[order]) and torch.equal(back, x)
    assert torch.equal(dx[order], torch.cat(grads))


@given(shapes(), st.booleans(), st.booleans())
def test_merge_with_residuals(shape, with_residual, with_residual_a):
    batch, tokens, keep, channels, dtype, layout = shape
    index_a, index_b = random_partition(batch, tokens, keep)
    leaves = {"a": rows(batch, keep, channels, dtype, layout), "b": rows(batch, tokens - keep, channels, dtype)}
    if with_residual:
        leaves["residual"] = rows(batch, tokens, channels, dtype, layout)
    if with_residual_a:
        leaves["residual_a"] = rows(batch, keep, channels, dtype, layout)
    grads = [torch.randn(batch, tokens, channels)]

    def run(module, dtype=None):
        def merge(a, b, *residuals):
            named = dict(zip([n for n in leaves if n not in "ab"], residuals, strict=True))
            return module.merge_tokens(a, index_a, b, index_b, **named)

        return results(merge, [t if dtype is None else t.to(dtype) for t in leaves.values()], grads)

    with poisoned_memory():
        ours = run(ops)
    for name, a, b, c in zip(["out", *leaves], ours, run(ref), run(ref, torch.float64), strict=True):
        assert_accurate(a, b, c, what=name)


@given(shapes(), st.integers(0, 50))
def test_gather_takes_any_list(shape, size):
    batch, tokens, _, channels, dtype, layout = shape
    size = size if tokens else 0
    index = torch.randint(0, max(tokens, 1), (batch, size), dtype=INT)  # in any order, with repeats
    x = rows(batch, tokens, channels, dtype, layout)
    grads = [torch.randn(batch, size, channels)]
    with poisoned_memory():
        ours = results(lambda x: ops.gather_tokens(x, index), [x], grads)
    same = results(lambda x: ref.gather_tokens(x, index), [x], grads)
    exact = results(lambda x: ref.gather_tokens(x, index), [x.double()], [g.to(dtype).double() for g in grads])
    assert torch.equal(ours[0], same[0])
    assert_accurate(ours[1], same[1], exact[1], what="dx")


@given(shapes(), st.booleans(), st.booleans(), st.booleans())
def test_gather_and_normalize(shape, rms, with_bias, float_weight):
    batch, tokens, keep, channels, dtype, layout = shape
    channels = max(channels, 1)
    index = random_partition(batch, tokens, keep)[0]
    parameter = torch.float32 if float_weight and dtype != torch.float64 else dtype
    leaves = [rows(batch, tokens, channels, dtype, layout), torch.randn(channels).to(parameter)]
    if with_bias and not rms:
        leaves.append(torch.randn(channels).to(parameter))
    grads = [torch.randn(batch, keep, channels).to(dtype) for _ in range(2)]
    name, eps = ("gather_rms_norm" if rms else "gather_layer_norm"), 1e-2

    def run(module, dtype=None):
        call = getattr(module, name)
        return results(
            lambda x, *w: call(x, index, *w, eps=eps),
            [t if dtype is None else t.to(dtype) for t in leaves],
            [g if dtype is None else g.to(dtype) for g in grads],
        )

    with poisoned_memory():
        ours = run(ops)
    assert torch.equal(ours[0], ref.gather_tokens(leaves[0], index))
    for what, a, b, c in zip(
        ["tokens", "normed", "dx", "dweight", "dbias"], ours, run(ref), run(ref, torch.float64), strict=False
    ):
        terms = 20.0 * (c.numel() and max(1.0, grads[1].float().abs().max().item() if grads[1].numel() else 1.0))
        assert_accurate(a, b, c, what=what, terms=terms)


def test_norms_agree_with_torch():
    x, index = torch.randn(2, 9, 48), random_partition(2, 9, 4)[0]
    weight, bias = torch.randn(48), torch.randn(48)
    tokens, normed = ops.gather_layer_norm(x, index, weight, bias)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(tokens, (48,), weight, bias))
    tokens, normed = ops.gather_rms_norm(x, index, weight)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(tokens, (48,), weight, 1e-6))


def test_gradcheck():
    index_a, index_b = random_partition(2, 5, 3)
    x, a, b, own = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 3, 2, 3))
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    repeats = torch.tensor([[4, 0, 4, 4], [1, 1, 2, 0]], dtype=INT)
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.gather_tokens(x, repeats), [x])
    assert check(lambda x: ops.separate_tokens(x, index_a, index_b), [x])
    assert check(lambda x: ops.separate_tokens(x, index_a, index_b)[1], [x])
    assert check(lambda a, b, r, o: ops.merge_tokens(a, index_a, b, index_b, residual=r, residual_a=o), [a, b, x, own])
    for index in (index_a, repeats):
        assert check(lambda x, w, b, i=index: ops.gather_layer_norm(x, i, w, b), [x, weight, bias])
        assert check(lambda x, w, b, i=index: ops.gather_layer_norm(x, i, w, b)[1], [x, weight, bias])
        assert check(lambda x, w, i=index: ops.gather_rms_norm(x, i, w), [x, weight])


def test_permute_twice_differentiable():
    order = torch.randperm(7)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    inverse = order.argsort().int()
    assert torch.autograd.gradgradcheck(lambda x: ops.permute_tokens(x.pow(3), order.int(), inverse, [2, 5]), (x,))


def test_only_some_gradients_are_wanted():
    index_a, index_b = random_partition(1, 6, 4)
    a, b = torch.randn(1, 4, 3, requires_grad=True), torch.randn(1, 2, 3)
    ops.merge_tokens(a, index_a, b, index_b).sum().backward()
    assert torch.equal(a.grad, torch.ones_like(a)) and b.grad is None
    b.requires_grad_()
    ops.merge_tokens(a.detach(), index_a, b, index_b).sum().backward()
    assert torch.equal(b.grad, torch.ones_like(b))


def test_offsets_beyond_two_to_the_31():
    # Only a page of each row is touched: the strides, not the memory, are large.
    count, stride = 3, 2**30 + 8
    storage = torch.empty(count * stride, dtype=torch.bfloat16)
    big = storage.as_strided((count, 9, 16), (stride, 16, 1))
    big.copy_(torch.randn(count, 9, 16))
    index_a, index_b = random_partition(count, 9, 4)
    for x, y in zip(
        ops.separate_tokens(big, index_a, index_b),
        ops.separate_tokens(big.clone(), index_a, index_b),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_threads_do_not_change_the_result():
    x, index = torch.randn(8, 197, 384), random_partition(8, 197, 90)[0]
    weight, grads = torch.randn(384), [torch.randn(8, 90, 384)] * 2
    before = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(results(lambda x, w: ops.gather_layer_norm(x, index, w), [x, weight], grads))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


# ---------------------------------------------------------------- selection


@st.composite
def score_rows(draw):
    """Scores with ties, NaN, infinities and both zeros."""
    batch, tokens = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 5, 64, 197, 1000]))
    keep = draw(st.integers(0, tokens))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["normal", "ties", "special"]))
    scores = torch.randn(batch, tokens)
    if kind == "ties":
        scores = torch.randint(0, 3, (batch, tokens)).float()
    if kind == "special":
        values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-40])
        scores = values[torch.randint(0, len(values), (batch, tokens))]
    scores = scores.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        scores = torch.nn.functional.pad(scores, (1, 2))[:, 1 : tokens + 1]
    return scores, keep, draw(st.integers(0, keep))


@given(score_rows())
def test_partition_is_exact(problem):
    scores, keep, protect = problem
    ours = ops.partition_tokens(scores, keep, protect=protect)
    for a, b in zip(ours, ref.partition_tokens(scores, keep, protect=protect), strict=True):
        assert a.dtype == INT and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads, dim, tokens", [(6, 64, 197), (1, 33, 50), (2, 1, 1), (3, 130, 9), (6, 8, 0)])
def test_class_scores(dtype, kv_heads, dim, tokens):
    q, k = torch.randn(3, 6, 1, dim).to(dtype), torch.randn(3, tokens, kv_heads, dim).to(dtype).transpose(1, 2)
    for scale in (None, 0.3, -1.0, 0.0):
        exact = ref.class_scores(q.double(), k.double(), scale)
        assert_accurate(ops.class_scores(q, k, scale), ref.class_scores(q, k, scale), exact)
    ours = ops.score_partition(q, k, tokens // 2, protect=min(tokens // 2, 1), scale=0.5)
    for a, b in zip(
        ours, ops.partition_tokens(ops.class_scores(q, k, 0.5), tokens // 2, protect=min(tokens // 2, 1)), strict=True
    ):
        assert torch.equal(a, b)


def test_class_scores_of_nan():
    q, k = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 7, 8)
    k[0, 1, 3] = math.nan
    scores = ops.class_scores(q, k)
    assert scores[0].isnan().all() and not scores[1].isnan().any()
    assert ops.score_partition(q, k, 3)[0][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_scores(dtype):
    q, k = (torch.randn(2, 3, 50, 16).to(dtype) for _ in range(2))
    exact = (q.double() @ k.double().mT * 16**-0.5).softmax(-1).mean((1, 2))
    same = (q @ k.mT * 16**-0.5).softmax(-1).mean((1, 2)).float()
    assert_accurate(ops.mean_scores(q, k), same, exact)


# ---------------------------------------------------------------- planners


def test_split_tokens_balances_the_branches():
    for length, a, b, c in itertools.product((0, 1, 7, 4096, 100_000), (0.0, 3.0), (0.0, 0.01), (0.5, 20.0)):
        if a + b == 0:
            continue
        n = ops.split_tokens(length, attention_cost=(a, b), ssm_cost=c)
        slower = [max(a * i + b * i * i, c * (length - i)) for i in range(length + 1)]
        assert slower[n] == pytest.approx(min(slower))


def test_circulate_visits_each_token_in_turn():
    for length, n in ((12, 4), (12, 5), (7, 0), (7, 7), (1, 1), (0, 0), (10, 3)):
        for block in range(9):
            attention, ssm = ops.circulate(length, n, block)
            expected = sorted((length - (block + 1) * n + j) % length for j in range(n)) if n else []
            assert attention.tolist() == expected and attention.dtype == ssm.dtype == INT
            assert sorted(attention.tolist() + ssm.tolist()) == list(range(length))
            assert ssm.tolist() == sorted(ssm.tolist())
    attention, ssm = ops.circulate(12, 5, 1)
    x = torch.randn(3, 12, 4)
    parts = ops.separate_tokens(x, attention.expand(3, -1), ssm.expand(3, -1))
    assert torch.equal(ops.merge_tokens(parts[0], attention.expand(3, -1), parts[1], ssm.expand(3, -1)), x)
