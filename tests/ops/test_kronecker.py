"""The kronecker ops against the reference: Gram matrices, low-rank bases, determinants, predictive covariances."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcore.ops import _kronecker_lowrank
from effcore.ops import kronecker as ops
from effcore.reference import kronecker as ref
from tests.support import assert_accurate, poisoned_memory

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tokens(count, dim, dtype, layout="plain"):
    if layout == "sliced":
        return torch.randn(count, dim + 3).to(dtype)[:, 1 : dim + 1]
    if layout == "expanded":
        return torch.randn(1, dim).to(dtype).expand(count, dim)
    return torch.randn(count, dim).to(dtype)


def offsets_of(loads, before=0):
    return torch.tensor([before, *loads], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@st.composite
def problems(draw):
    loads = draw(st.lists(st.sampled_from([0, 1, 2, 5, 31, 32, 33, 200, 600]), max_size=4))
    before, behind = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    dim = draw(st.sampled_from([0, 1, 2, 7, 16, 17, 40, 64, 65, 127, 128, 129, 200]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["plain", "sliced", "expanded"]))
    return tokens(sum(loads) + before + behind, dim, dtype, layout), offsets_of(loads, before)


@given(problems())
def test_gram(problem):
    x, offsets = problem
    with poisoned_memory():
        ours = ops.grouped_gram(x, offsets)
    assert torch.equal(ours, ours.mT)
    same, exact = ref.grouped_gram(x, offsets), ref.grouped_gram(x.double(), offsets)
    assert_accurate(ours, same, exact, terms=x.double().square().sum().item())


@given(problems(), st.sampled_from([0.0, 1.0, -0.75]), st.sampled_from([1.0, 0.5, 0.0]))
def test_gram_adds_to_what_there_is(problem, beta, alpha):
    x, offsets = problem
    experts, dim = len(offsets) - 1, x.shape[1]
    before = torch.randn(experts, dim, dim, dtype=wide(x.dtype))
    before = before + before.mT
    out = before.clone() if beta else torch.full_like(before, float("nan"))  # with beta 0 out is not read
    result = ops.grouped_gram(x, offsets, alpha=alpha, beta=beta, out=out)
    assert result is out and torch.equal(out, out.mT)
    same = ref.grouped_gram(x, offsets, alpha=alpha, beta=beta, out=before)
    exact = ref.grouped_gram(x.double(), offsets, alpha=alpha, beta=beta, out=before.double())
    assert_accurate(out, same, exact, terms=x.double().square().sum().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [736, 741])
def test_gram_whose_results_go_past_the_caches(dim, dtype):
    """More than 16 MiB, blocks off the diagonal, rows that are whole lines and rows that are not."""
    torch.manual_seed(0)
    loads = [40, 0, 3, 270, 1, 5, 2, 8]
    x, offsets = tokens(sum(loads), dim, dtype), offsets_of(loads)
    with poisoned_memory():
        ours, scaled = ops.grouped_gram(x, offsets), ops.grouped_gram(x, offsets, alpha=-0.5)
    assert torch.equal(ours, ours.mT) and torch.equal(scaled, -0.5 * ours)
    same, exact = ref.grouped_gram(x, offsets), ref.grouped_gram(x.double(), offsets)
    assert_accurate(ours, same, exact, terms=x.double().square().sum().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_many_tokens_is_the_same_with_any_number_of_threads(dtype):
    """Several segments an expert, and more than one wave."""
    x, offsets = tokens(10_000, 130, dtype), offsets_of([9_001, 0, 998])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.grouped_gram(x, offsets))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)
    # Extended precision: torch's own float64 product of 9,001 terms is up to twenty times less exact than ours (AMD's CPUs).
    wider = [x[a:b].double().numpy().astype(np.longdouble) for a, b in pairwise(offsets.tolist())]
    exact = torch.stack([torch.from_numpy((part.T @ part).astype(np.float64)) for part in wider])
    assert_accurate(results[0], ref.grouped_gram(x, offsets), exact)


def test_gram_of_rows_beyond_two_gigabytes():
    """Row 2²¹ · 1024 of a strided view lies behind 2³¹ elements; the memory in between is never touched."""
    rows = torch.empty(2**21 + 2, 1040, dtype=torch.float16)[:: 2**20]
    rows.copy_(torch.randn(rows.shape))
    offsets = offsets_of([1, len(rows) - 1])
    assert rows.stride(0) * (len(rows) - 1) > 2**31
    assert_accurate(
        ops.grouped_gram(rows, offsets), ref.grouped_gram(rows, offsets), ref.grouped_gram(rows.double(), offsets)
    )


def test_nan_stays_with_its_expert():
    x, offsets = tokens(20, 40, torch.float32), offsets_of([10, 10])
    x[3, 5] = float("nan")
    gram = ops.grouped_gram(x, offsets)
    assert gram[0, 5].isnan().all() and gram[0, :, 5].isnan().all() and gram[1].isfinite().all()
    assert int(gram[0].isnan().sum()) == 2 * 40 - 1


# ---------------------------------------------------------------- low rank


@st.composite
def lowrank_problems(draw):
    dim = draw(st.sampled_from([1, 2, 9, 30, 64]))
    rank = draw(st.integers(0, min(dim, 12)))
    loads = draw(st.lists(st.sampled_from([0, 1, 3, 17, 100]), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    basis = ref.grouped_lowrank_update(
        torch.zeros(len(loads), dim, rank, dtype=dtype), torch.zeros(len(loads), dtype=dtype),
        *([tokens(40, dim, dtype), offsets_of([40 // len(loads)] * len(loads))]),
    )  # fmt: skip
    return (*basis, tokens(sum(loads), dim, dtype), offsets_of(loads))


@given(lowrank_problems())
def test_lowrank_update(problem):
    basis, discarded, x, offsets = problem
    with poisoned_memory():
        new, left = ops.grouped_lowrank_update(*problem)
    dense = basis @ basis.mT + ref.grouped_gram(x, offsets)
    best = ref.grouped_lowrank_update(*problem)
    scale = dense.abs().amax((1, 2), keepdim=True).clamp_min(1e-3)
    tolerance = 2e-5 if x.dtype == torch.float32 else 1e-12
    # Eigenvectors of near-equal eigenvalues are free to turn; what a basis captures is not.
    for ours, theirs in ((new, best[0]),):
        lengths = ours.square().sum(1), theirs.square().sum(1)
        assert torch.allclose(lengths[0] / scale[:, :, 0], lengths[1] / scale[:, :, 0], atol=10 * tolerance)
        captured = [torch.linalg.norm(dense - b @ b.mT) for b in (ours, theirs)]
        assert captured[0] <= captured[1] + 20 * tolerance * torch.linalg.norm(dense) + 1e-12
    trace = new.square().sum((1, 2)) + left
    torch.testing.assert_close(
        trace, dense.diagonal(dim1=1, dim2=2).sum(1) + discarded, rtol=20 * tolerance, atol=20 * tolerance
    )


def test_lowrank_update_of_large_sides_captures_what_there_is():
    """Both sides beyond the dense limit: a slowly falling spectrum, the hard case of a Krylov space."""
    torch.manual_seed(0)
    dim, count, rank = 700, 900, 10
    x = torch.randn(count, dim) * torch.arange(1, dim + 1).float().rsqrt()
    x = x @ torch.linalg.qr(torch.randn(dim, dim)).Q
    zeros = torch.zeros(1, dim, rank), torch.zeros(1)
    basis, discarded = ops.grouped_lowrank_update(*zeros, x, offsets_of([count]))
    best = torch.linalg.svdvals(x.double())[:rank].square()
    captured = basis.double().square().sum()
    assert captured >= (1 - 1e-3) * best.sum()
    torch.testing.assert_close(captured + discarded.double()[0], x.double().square().sum(), rtol=1e-5, atol=0)
    again = ops.grouped_lowrank_update(*zeros, x, offsets_of([count]))
    assert torch.equal(basis, again[0])


def test_subspace_iteration_as_on_a_gpu_captures_what_there_is():
    torch.manual_seed(0)
    x = torch.randn(900, 700) * torch.arange(1, 701).float().rsqrt()
    x = x @ torch.linalg.qr(torch.randn(700, 700)).Q
    gram = torch.stack([x.mT @ x, torch.zeros(700, 700)])  # and an expert without tokens
    basis = _kronecker_lowrank._iterate(gram, torch.zeros(2, 700, 10))
    best = torch.linalg.svdvals(x.double())[:10].square()
    assert (1 - 1e-4) * best.sum() <= basis[0].double().square().sum() <= (1 + 1e-5) * best.sum()
    products = basis[0].mT @ basis[0]
    assert (products - products.diagonal().diag()).abs().max() < 1e-5 * best[0]
    assert not basis[1].any()


def test_orthonormal_basis_of_columns_that_depend_on_each_other():
    x = torch.randn(2, 50, 6)
    x[0, :, 3] = x[0, :, 1] + 1e-4 * x[0, :, 2]
    x[1] = 0
    q = _kronecker_lowrank._orthonormal(x, passes=2)
    torch.testing.assert_close(q[0] @ (q[0].mT @ x[0]), x[0])  # the same columns are reached
    assert (torch.linalg.eigvalsh(q.mT @ q) < 1 + 1e-5).all() and not q[1].any()


def test_updates_in_pieces_equal_one_update_at_full_rank():
    x = tokens(90, 12, torch.float64)
    basis, discarded = torch.zeros(1, 12, 12, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for piece in x.split(13):
        basis, discarded = ops.grouped_lowrank_update(basis, discarded, piece, offsets_of([len(piece)]))
    torch.testing.assert_close(basis @ basis.mT, (x.mT @ x)[None])
    assert discarded.abs().max() < 1e-10


# ---------------------------------------------------------------- closed forms of the posterior


def factor(experts, dim, rank):
    vectors = torch.linalg.qr(torch.randn(experts, dim, dim, dtype=torch.float64)).Q[:, :, :rank]
    values, rest = torch.rand(2, experts, max(rank, 1), dtype=torch.float64)
    return ops.Factor(vectors.contiguous(), values[:, :rank] * 5, rest[:, 0])


@given(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2**16))
def test_log_det_equals_the_dense_one(rank_a, rank_b, seed):
    torch.manual_seed(seed)
    a, b = factor(2, 4, rank_a), factor(2, 3, rank_b)
    variance = 0.7
    ours = ops.kron_log_det(a, b, variance)
    for e, (dense_a, dense_b) in enumerate(zip(ref.dense_factor(*a), ref.dense_factor(*b), strict=True)):
        precision = torch.eye(12, dtype=torch.float64) + variance * torch.kron(dense_a, dense_b)
        torch.testing.assert_close(ours[e], torch.logdet(precision))


@given(st.integers(0, 4), st.integers(0, 3), st.integers(1, 4), st.integers(0, 2**16))
def test_variance_equals_the_dense_one(rank_a, rank_b, classes, seed):
    torch.manual_seed(seed)
    a, b = factor(3, 4, rank_a), factor(3, 3, rank_b)
    loads, examples = [5, 0, 4], 3
    inputs, grads = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, classes, 3, dtype=torch.float64)
    example = torch.randint(0, examples, (9,))
    variances = torch.tensor([0.1, 3.0], dtype=torch.float64)
    ours = ops.kron_variance(inputs, grads, offsets_of(loads), example, examples, a, b, variances)
    expert = torch.arange(3).repeat_interleave(torch.tensor(loads))
    exact = ref.kron_variance(inputs, grads, expert, example, examples, a, b, variances)
    torch.testing.assert_close(ours, exact)


def test_the_order_of_vec_matters():
    """The reference would not see the two factors swapped if they were alike: they are not."""
    a, b = factor(1, 3, 3), factor(1, 3, 3)
    inputs, grads = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    where = offsets_of([1]), torch.zeros(1, dtype=torch.long), 1
    variance = torch.ones(1, dtype=torch.float64)
    right = ops.kron_variance(inputs, grads, *where, a, b, variance)
    swapped = ops.kron_variance(inputs, grads, *where, b, a, variance)
    exact = ref.kron_variance(inputs, grads, where[1], where[1], 1, a, b, variance)
    torch.testing.assert_close(right, exact)
    assert not torch.allclose(swapped, exact)
