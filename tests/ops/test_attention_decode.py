"""Decoding one token a row against a padded cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcore.ops import attention as ops
from effcore.reference import attention as ref
from tests.support import LAYOUTS, REFUSED, assert_accurate, heads, poisoned_memory


@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    keys=st.sampled_from([0, 1, 5, 255, 256, 257, 700]),
    head_dim=st.sampled_from([1, 5, 64, 128]),
    value_dim=st.sampled_from([3, 64, 80]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
    left_padded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_decode_matches_the_reference(
    batch, kv_heads, group, keys, head_dim, value_dim, dtype, layout, left_padded, seed
):
    torch.manual_seed(seed)
    q = heads(batch, kv_heads * group, 1, head_dim, dtype)
    k, v, w = (heads(batch, kv_heads, keys, d, dtype, layout) for d in (head_dim, value_dim, value_dim))
    lengths = torch.randint(0, keys + 1, (batch,), dtype=torch.int32)
    first = torch.randint(0, keys + 1, (batch,), dtype=torch.int32) if left_padded else None
    with poisoned_memory():
        out, probs = ops.decode_attention(q, k, v, lengths, first_key=first, return_probs=True)
        second = ops.decode_from_probs(probs, w, lengths)
        alone = ops.decode_attention(q, k, v, lengths, first_key=first)
    assert torch.equal(out, alone)
    same, same_probs = ref.decode_attention(q, k, v, lengths, first_key=first, return_probs=True)
    exact, exact_probs = ref.decode_attention(
        q.double(), k.double(), v.double(), lengths, first_key=first, return_probs=True
    )
    terms = v.double().abs().max().item() if v.numel() else 0.0
    assert_accurate(out, same, exact, what="out", terms=terms)
    assert_accurate(
        second,
        ref.decode_from_probs(same_probs, w, lengths),
        ref.decode_from_probs(exact_probs, w.double(), lengths),
        terms=terms,
    )


def test_decode_equals_the_last_row_of_attention():
    q, k, v = (torch.randn(2, 4, 50, 16) for _ in range(3))
    lengths = torch.tensor([50, 50], dtype=torch.int32)
    torch.testing.assert_close(
        ops.decode_attention(q[:, :, -1:], k, v, lengths), ops.attention(q, k, v, causal=True)[:, :, -1:]
    )


def test_decoding_is_not_differentiable():
    q = torch.randn(1, 1, 1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        ops.decode_attention(q, q, q, torch.ones(1, dtype=torch.int32))


def test_decode_wants_one_token():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(REFUSED, match="one token a row, got 2"):
        ops.decode_attention(q, q, q, torch.ones(1, dtype=torch.int32))
