"""The exact gradients of layer groups: QK sharing (one P, many V) and KV sharing (one K,V, many Q)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from effcore.ops import _attention_plan as plan
from effcore.ops import attention as ops
from effcore.reference import attention as ref
from tests.ops.test_attention import gradient_terms, size
from tests.support import LAYOUTS, REFUSED, assert_accurate, heads, poisoned_memory

KEEPS = ["lse", "probs"]


def qk_group(api, q, k, values, *, keep="lse", chain=True, consumers=None, **visibility):
    """A stack of layers on one P; with `chain` each layer's values depend on the output of the one before."""
    options = {} if api is ref else {"keep": keep}
    out, shared = api.attention_with_scores(
        q, k, values[0], consumers=len(values) - 1 if consumers is None else consumers, **options, **visibility
    )
    outs = [out]
    for scores, v in zip(shared, values[1:], strict=False):
        if chain and out.shape == v.shape:
            v = v + torch.tanh(outs[-1])
        outs.append(api.attention_from_scores(scores, v))
    return outs


def kv_group(api, queries, k, v, **visibility):
    shared = api.share_kv(k, v)
    return [api.attention_shared_kv(q, shared, **visibility) for q in queries]


def weighted(outs):
    return sum((o.float() * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)).sum() for o in outs)


def leaves_of(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


@st.composite
def groups(draw):
    batch, kv_heads, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    tokens = st.sampled_from([1, 3, 16, 63, 65, 130])
    queries, keys = draw(tokens), draw(tokens)
    dims = st.sampled_from([1, 5, 16, 64, 72])
    head_dim, value_dim = draw(dims), draw(dims)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    n, layout = draw(st.integers(1, 5)), draw(st.sampled_from(LAYOUTS))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    visibility = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        visibility["lengths"] = torch.randint(0, keys + 1, (batch,), dtype=torch.int32)
    if draw(st.booleans()):
        visibility["first_key"] = torch.randint(0, keys + 1, (batch, queries), dtype=torch.int32).sort(-1).values
    q = heads(batch, kv_heads * share, queries, head_dim, dtype, layout)
    k = heads(batch, kv_heads, keys, head_dim, dtype, draw(st.sampled_from(LAYOUTS)))
    values = [heads(batch, kv_heads, keys, value_dim, dtype, layout) for _ in range(n)]
    return q, k, values, visibility


@given(groups(), st.sampled_from(KEEPS))
def test_qk_group_matches_the_reference(group, keep):
    q, k, values, visibility = group
    results = []
    for api, dtype in ((ops, q.dtype), (ref, q.dtype), (ref, torch.float64)):
        leaves = leaves_of(q, k, *values, dtype=dtype)
        with poisoned_memory():
            outs = qk_group(api, leaves[0], leaves[1], leaves[2:], keep=keep, **visibility)
        results.append((outs, torch.autograd.grad(weighted(outs), leaves)))
    for ours, same, exact in zip(*(r[0] for r in results), strict=True):
        assert_accurate(ours, same, exact, what="out", terms=size(values[0].float()))
    terms = gradient_terms(
        q, k, torch.cat([*values, torch.ones_like(values[0])], 3), torch.full((1,), len(values)), None
    )
    for name, ours, same, exact in zip(["q", "k", *"v" * len(values)], *(r[1] for r in results), strict=True):
        assert_accurate(ours, same, exact, what=f"d{name}", terms=terms[name])


@given(groups())
def test_kv_group_matches_the_reference(group):
    q, k, values, visibility = group
    queries = [q, *(torch.randn_like(q) for _ in values[1:])]
    results = []
    for api, dtype in ((ops, q.dtype), (ref, q.dtype), (ref, torch.float64)):
        leaves = leaves_of(k, values[0], *queries, dtype=dtype)
        outs = kv_group(api, leaves[2:], leaves[0], leaves[1], **visibility)
        results.append((outs, torch.autograd.grad(weighted(outs), leaves)))
    for ours, same, exact in zip(*(r[0] for r in results), strict=True):
        assert_accurate(ours, same, exact, what="out", terms=size(values[0].float()))
    terms = gradient_terms(q, k, values[0], torch.full((1,), len(values)), None)
    for name, ours, same, exact in zip(["k", "v", *"q" * len(values)], *(r[1] for r in results), strict=True):
        assert_accurate(ours, same, exact, what=f"d{name}", terms=terms[name])


@pytest.mark.parametrize("keep", KEEPS)
def test_qk_gradcheck(keep):
    leaves = leaves_of(*(torch.randn(1, 2, 5, 3, dtype=torch.float64) for _ in range(5)))
    assert torch.autograd.gradcheck(
        lambda q, k, *v: tuple(qk_group(ops, q, k, v, keep=keep, causal=True)), leaves, atol=1e-7
    )


def test_kv_gradcheck():
    leaves = leaves_of(*(torch.randn(1, 2, 5, 3, dtype=torch.float64) for _ in range(4)))
    assert torch.autograd.gradcheck(lambda k, v, *q: tuple(kv_group(ops, q, k, v, causal=True)), leaves, atol=1e-7)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("used", [[], [0], [1], [0, 2]])
def test_unused_consumers_and_unused_owner(keep, used):
    q, k, v, *own = leaves_of(*(torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(6)))

    def loss(api, with_owner):
        options = {} if api is ref else {"keep": keep}
        out, shared = api.attention_with_scores(q, k, v, consumers=3, causal=True, **options)
        outs = [api.attention_from_scores(shared[i], own[i]) for i in used]
        return weighted([out, *outs] if with_owner else outs)

    for with_owner in (True, False) if used else (True,):
        ours = torch.autograd.grad(loss(ops, with_owner), [q, k, v, *own], allow_unused=True)
        exact = torch.autograd.grad(loss(ref, with_owner), [q, k, v, *own], allow_unused=True)
        for leaf, a, b in zip([q, k, v, *own], ours, exact, strict=True):
            zero = torch.zeros_like(leaf)
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_a_second_use_raises():
    q, k, v, a, b = leaves_of(*(torch.randn(1, 1, 6, 4) for _ in range(5)))
    out, (scores,) = ops.attention_with_scores(q, k, v, consumers=1)
    total = out.sum() + ops.attention_from_scores(scores, a).sum() + ops.attention_from_scores(scores, b).sum()
    with pytest.raises(REFUSED, match="used by 2 layers"):
        total.backward()


@pytest.mark.parametrize("keep", KEEPS)
def test_non_reentrant_checkpointing_changes_nothing(keep):
    tensors = [torch.randn(2, 2, 20, 8, dtype=torch.float64) for _ in range(5)]

    def run(wrap):
        q, k, *values = leaves = leaves_of(*tensors)
        out, shared = wrap(
            lambda q, k, v: ops.attention_with_scores(q * 1.5, k, v, consumers=2, keep=keep, causal=True),
            q,
            k,
            values[0],
        )
        for scores, v in zip(shared, values[1:], strict=True):
            out = wrap(lambda o, s, v: o + ops.attention_from_scores(s, v + torch.tanh(o)), out, scores, v)
        return torch.autograd.grad(out.square().sum(), leaves)

    plain = run(lambda f, *x: f(*x))
    for a, b in zip(plain, run(lambda f, *x: checkpoint(f, *x, use_reentrant=False)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("used", [[0], [2], [0, 1], [0, 2], [0, 1, 2]])
def test_kv_layers_without_gradients(used, dtype):
    """The sums of dK and dV pass through layers whose outputs nobody uses, and around those that ran without gradients."""
    tensors = [torch.randn(1, 2, 12, 8, dtype=torch.float64).to(dtype) for _ in range(5)]

    def gradients(api, dtype):
        k, v, *queries = leaves_of(*tensors, dtype=dtype)
        shared, outs = api.share_kv(k, v), []
        for q in queries:
            with torch.no_grad():
                api.attention_shared_kv(q, shared)
            outs.append(api.attention_shared_kv(q, shared, causal=True))
        return torch.autograd.grad(weighted([outs[i] for i in used]), [k, v, *(queries[i] for i in used)])

    for a, b in zip(gradients(ops, dtype), gradients(ref, torch.float64), strict=True):
        assert a.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(a, b)
        else:
            assert (a.double() - b).norm() < 0.01 * b.norm()


def test_kv_group_under_checkpointing_and_compiled():
    tensors = [torch.randn(2, 2, 20, 8, dtype=torch.float64) for _ in range(5)]

    def run(wrap):
        k, v, *queries = leaves = leaves_of(*tensors)
        shared = wrap(lambda k, v: ops.share_kv(k * 1.5, v), k, v)
        out = torch.zeros_like(queries[0])
        for q in queries:
            out = wrap(lambda o, s, q: o + ops.attention_shared_kv(q + torch.tanh(o), s, causal=True), out, shared, q)
        return torch.autograd.grad(out.square().sum(), leaves)

    plain = run(lambda f, *x: f(*x))
    whole = torch.compile(
        lambda k, v, *q: tuple(kv_group(ops, q, k, v, causal=True)), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(plain, run(lambda f, *x: checkpoint(f, *x, use_reentrant=False)), strict=True):
        torch.testing.assert_close(a, b)
    leaves = leaves_of(*tensors)
    for a, b in zip(
        torch.autograd.grad(weighted(whole(*leaves)), leaves),
        torch.autograd.grad(weighted(kv_group(ops, leaves[2:], leaves[0], leaves[1], causal=True)), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", KEEPS)
def test_flat_form_survives_reentrant_checkpointing(keep):
    tensors = [torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(4)]

    def owner(q, k, v):
        out, (scores,) = ops.attention_with_scores(q, k, v, consumers=1, keep=keep, causal=True)
        return out, *scores.tensors()

    def consumer(out, v, *flat):
        return out + ops.attention_from_scores(ops.SharedScores(flat, causal=True), v + torch.tanh(out))

    def run(wrap):
        q, k, v, w = leaves = leaves_of(*tensors)
        out, *flat = wrap(owner, q, k, v)
        wrap(consumer, out, w, *flat).square().sum().backward()
        return [t.grad for t in leaves]

    plain = run(lambda f, *x: f(*x))
    for a, b in zip(plain, run(lambda f, *x: checkpoint(f, *x, use_reentrant=True)), strict=True):
        torch.testing.assert_close(a, b)


def test_two_backwards_through_one_graph():
    leaves = leaves_of(*(torch.randn(1, 2, 12, 8) for _ in range(4)))
    loss = weighted(qk_group(ops, leaves[0], leaves[1], leaves[2:]))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group", ["qk", "kv"])
def test_autocast(group):
    leaves = leaves_of(*(torch.randn(1, 2, 12, 8) for _ in range(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if group == "qk":
            outs = qk_group(ops, leaves[0], leaves[1], leaves[2:])
        else:
            outs = kv_group(ops, leaves[2:], leaves[0], leaves[1])
    assert all(o.dtype == torch.bfloat16 for o in outs)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(weighted(outs), leaves))


def test_kv_gradients_are_summed_before_they_are_rounded():
    """Sixteen consumers: rounding each one's bfloat16 dK before adding would cost more than twice this error."""
    k, v = torch.randn(1, 2, 64, 32).bfloat16(), torch.randn(1, 2, 64, 32).bfloat16()
    queries = [torch.randn(1, 2, 64, 32).bfloat16() for _ in range(16)]

    def grads(api, dtype):
        leaves = leaves_of(k, v, dtype=dtype)
        return torch.autograd.grad(
            weighted(kv_group(api, [q.to(dtype) for q in queries], *leaves, causal=True)), leaves
        )

    exact = grads(ref, torch.float64)
    for ours, single, c in zip(grads(ops, torch.bfloat16), grads(ref, torch.float32), exact, strict=True):
        rounded_once = single.bfloat16().double()
        assert (ours.double() - c).norm() < 1.6 * (rounded_once - c).norm() + 3e-3 * c.norm()


@pytest.mark.parametrize("keep", KEEPS)
def test_slots_hold_no_memory(keep):
    q, k, v = leaves_of(*(torch.randn(1, 2, 64, 8) for _ in range(3)))
    _, shared = ops.attention_with_scores(q, k, v, consumers=3, keep=keep, causal=True)
    for s in shared:
        for slot in (s.dout_slot, s.value_slot, s.delta):
            assert slot.untyped_storage().nbytes() <= 8
    assert len({s.dout_slot.untyped_storage().data_ptr() for s in shared}) == 3


def test_kept_probabilities_of_a_causal_layer_cost_half():
    shared = [
        ops.attention_with_scores(*(torch.randn(1, 1, 1024, 8) for _ in range(3)), keep="probs", causal=c)[1][0]
        for c in (True, False)
    ]
    factors = 2 * 1024  # of the rows, behind the tiles
    assert (shared[0].probs.numel() - factors) / (shared[1].probs.numel() - factors) == pytest.approx(17 / 32)


def test_auto_is_a_function_of_shapes_and_budget(monkeypatch):
    monkeypatch.setattr(ops, "_budget_bytes", None)
    q = torch.randn(1, 2, 256, 8)
    try:
        ops.set_probs_budget(10**9)
        assert "probs" in repr(ops.attention_with_scores(q, q, q)[1][0])
        ops.set_probs_budget(1000)
        assert "lse" in repr(ops.attention_with_scores(q, q, q)[1][0])
        assert "GiB" in ops.explain_keep(q, q, causal=False, consumers=1)
    finally:
        monkeypatch.undo()
    assert "no layer" in ops.explain_keep(q, q, causal=False, consumers=0)
    assert ops.plan_keep(q, q, causal=False, consumers=0) == "lse"


@pytest.mark.parametrize("kernels", ["CPU", "portable CUDA", "Hopper", "H100"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_plan_and_its_reason_agree(kernels, head_dim):
    plans = {}
    for consumers in (1, 3, 15):
        for num_bytes in (1 << 20, 1 << 32):
            question = (kernels, head_dim, consumers, num_bytes, 2 << 30)
            plans[consumers, num_bytes] = chosen = plan.choose(*question)
            assert (chosen == "probs") == ("was faster with" in plan.explain(*question))
            assert chosen == "lse" or num_bytes <= 2 << 30
    small = [plans[n, 1 << 20] for n in (1, 3, 15)]
    assert small == sorted(small)  # from some number of consumers on


@pytest.mark.parametrize(
    "capability,name,kernels",
    [
        ((9, 0), "NVIDIA H200", "Hopper"),
        ((9, 0), "NVIDIA H100 80GB HBM3", "H100"),
        ((8, 0), "NVIDIA A100", "portable CUDA"),
    ],
)
def test_the_plan_knows_the_card(monkeypatch, capability, name, kernels):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    assert plan.kernels_of("cuda", 0) == kernels
    assert plan.kernels_of("cpu", None) == "CPU"


def test_statistics_refuse_another_dtype():
    q = torch.randn(1, 2, 8, 4).bfloat16()
    _, (scores,) = ops.attention_with_scores(q, q, q)
    scores.lse = scores.lse.bfloat16()
    with pytest.raises(REFUSED, match="lse is bfloat16 but must be float32"):
        ops.attention_from_scores(scores, q)
