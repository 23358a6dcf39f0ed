"""A bad argument is an exception that names the argument, what was expected and what came."""

import pytest
import torch

from effcore.ops import attention as ops
from tests.support import REFUSED


def tensor(*sizes, dtype=torch.float32):
    return torch.randn(*sizes).to(dtype)


Q, K, V = tensor(2, 4, 16, 8), tensor(2, 2, 16, 8), tensor(2, 2, 16, 8)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = {
    "rank": ((tensor(2, 4, 8), K, V), {}, r"q must have 4 dimensions.*\[2, 4, 8\]"),
    "k tokens": ((Q, tensor(2, 2, 12, 8), V), {}, r"v has 16 tokens but k has 12"),
    "head_dim": ((Q, tensor(2, 2, 16, 9), V), {}, r"k has head dimension 9 but q has 8"),
    "batch": ((Q, tensor(3, 2, 16, 8), tensor(3, 2, 16, 8)), {}, r"k has batch.* 3.* 2"),
    "heads": ((Q, tensor(2, 3, 16, 8), tensor(2, 3, 16, 8)), {}, r"4.*multiple.*3"),
    "v heads": ((Q, K, tensor(2, 1, 16, 8)), {}, r"v has 1 .*heads.*2"),
    "dtype": ((Q, K.double(), V), {}, r"k (must be|is) .*float"),
    "dtype kind": ((Q.int(), K.int(), V.int()), {}, r"float32"),
    "last stride": ((Q.transpose(2, 3), tensor(2, 2, 16, 16), V), {}, r"q must be contiguous in its last dimension"),
    "too wide": ((tensor(1, 1, 4, 257),) * 3 + ({}, r"256"), {}, ""),
    "lengths dtype": ((Q, K, V), {"lengths": torch.tensor([3, 4])}, r"lengths.*int32"),
    "lengths shape": ((Q, K, V), {"lengths": i32(3)}, r"lengths.*\[?2\]?"),
    "lengths negative": ((Q, K, V), {"lengths": i32(3, -1)}, r"lengths.*-1"),
    "lengths long": ((Q, K, V), {"lengths": i32(17, 1)}, r"lengths.*17"),
    "first_key shape": ((Q, K, V), {"first_key": i32(1, 2, 3)}, r"first_key"),
    "first_key decreasing": (
        (Q, K, V),
        {"first_key": i32(*range(16, 0, -1)).expand(2, -1).contiguous()},
        r"first_key.*decreas",
    ),
    "first_key range": ((Q, K, V), {"first_key": i32(0, -3)}, r"first_key.*-3"),
    "scale": ((Q, K, V), {"scale": float("nan")}, r"scale.*finite"),
}
CASES["too wide"] = ((tensor(1, 1, 4, 257),) * 3, {}, r"256.*257|257.*256")


def test_decoding_takes_no_other_object_for_probabilities():
    with pytest.raises(TypeError, match="probs must be a DecodeProbs of decode_attention, got Tensor"):
        ops.decode_from_probs(torch.ones(1), torch.ones(1, 1, 4, 8), torch.ones(1, dtype=torch.int32))


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case):
    arguments, options, message = CASES[case]
    with pytest.raises(REFUSED, match=message) as error:
        ops.attention(*arguments, **options)
    assert str(error.value).startswith("effcore.attention: ")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.attention_with_scores(Q, K, V, keep="both"), "keep must be"),
        (lambda: ops.attention_with_scores(Q, K, V, consumers=-1), "consumers must not be negative"),
        (lambda: ops.attention_from_scores(ops.attention_with_scores(Q, K, V)[1][0], V[:, :, :7]), "v has 7 tokens"),
        (lambda: ops.attention_from_scores(ops.attention_with_scores(Q, K, V)[1][0], V[..., :7]), "v"),
        (lambda: ops.attention_from_scores("scores", V), "must be a SharedScores, got str"),
        (lambda: ops.attention_shared_kv(Q, (K, V)), "must be a SharedKV, got tuple"),
        (lambda: ops.share_kv(K, V[:, :, :3]), "v has 3 tokens but k has 16"),
        (lambda: ops.set_probs_budget(-1), "must not be negative"),
    ],
)
def test_other_refusals(call, message):
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError), match=message):
        call()


@pytest.mark.parametrize("name", ["dropout", "dropout_p", "attn_mask", "bias", "softcap"])
def test_unsupported_features_are_refused_by_name(name):
    with pytest.raises(TypeError, match=name):
        ops.attention(Q, K, V, **{name: 0.1})


@pytest.mark.cuda
def test_mixed_devices_are_refused():
    with pytest.raises(REFUSED, match="k is on cpu but q is on cuda:0"):
        ops.attention(Q.cuda(), K, V)
    with pytest.raises(REFUSED, match="lengths is on cpu"):
        ops.attention(Q.cuda(), K.cuda(), V.cuda(), lengths=i32(1, 2))
