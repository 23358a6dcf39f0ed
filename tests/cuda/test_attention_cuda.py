"""The CUDA ops as torch sees them: autograd, compilation, graphs, refusals. (check_attention.py compares the numbers.)"""

import pytest
import torch

from effcore.ops import attention as ops
from tests.ops.test_attention_compile import FUNCTIONS
from tests.ops.test_attention_sharing import KEEPS, leaves_of, qk_group, weighted
from tests.support import REFUSED

pytestmark = pytest.mark.cuda


def randn(*sizes, dtype=torch.bfloat16):
    return torch.randn(*sizes, device="cuda", dtype=dtype)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_second_use_gives_nan_and_never_a_plausible_gradient(keep):
    q, k, v, a, b = leaves_of(*(randn(1, 2, 70, 64) for _ in range(5)))
    out, (scores,) = ops.attention_with_scores(q, k, v, consumers=1, keep=keep, causal=True)
    total = out.sum() + ops.attention_from_scores(scores, a).sum() + ops.attention_from_scores(scores, b).sum()
    dq, dk = torch.autograd.grad(total, (q, k))
    assert dq.isnan().all() and dk.isnan().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    tensors = [randn(2, 2, 100, 64) for _ in range(4)]
    results = []
    for function in (FUNCTIONS[name], torch.compile(FUNCTIONS[name], fullgraph=True)):
        leaves = leaves_of(*tensors)
        outs = function(*leaves)
        results.append([*outs, *torch.autograd.grad(weighted(outs), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_a_training_step_can_be_captured_in_a_graph():
    leaves = leaves_of(*(randn(2, 4, 256, 64) for _ in range(5)))
    weight = randn(2, 4, 256, 64)

    def step():
        outs = qk_group(ops, leaves[0], leaves[1], leaves[2:], causal=True, chain=False)
        return torch.autograd.grad([sum(outs)], leaves, [weight])

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_lengths_out_of_range_are_clamped():
    q, k, v = (randn(2, 2, 33, 64) for _ in range(3))
    wild = torch.tensor([-5, 1000], dtype=torch.int32, device="cuda")
    assert torch.equal(ops.attention(q, k, v, lengths=wild), ops.attention(q, k, v, lengths=wild.clamp(0, 33)))


def test_float64_is_refused_by_name():
    q = randn(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(REFUSED, match="float64"):
        ops.attention(q, q, q)


def test_mixed_devices_are_refused():
    q = randn(1, 1, 4, 8)
    with pytest.raises(REFUSED, match="k is on cpu"):
        ops.attention(q, q.cpu(), q)
    with pytest.raises(REFUSED, match="lengths is on cpu"):
        ops.attention(q, q, q, lengths=torch.ones(1, dtype=torch.int32))


def test_the_current_stream_is_respected():
    q = randn(4, 8, 1024, 64)
    expected = ops.attention(q, q, q, causal=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(10_000_000)
        late = q.clone()
        out = ops.attention(late, late, late, causal=True)
    side.synchronize()
    assert torch.equal(out, expected)
