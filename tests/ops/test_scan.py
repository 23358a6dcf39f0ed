"""The scan family against the reference: forward, backward, states, packed sequences, extreme step sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from effcore.ops import scan as ops
from effcore.reference import scan as ref
from tests.support import assert_accurate, poisoned_memory, rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ("plain", "sliced", "expanded", "token-major")
LENGTHS = [0, 1, 2, 3, 7, 17, 63, 64, 65, 130]
CHANNELS = [0, 1, 3, 16, 33, 64, 70, 130]


def results(function, leaves, grads):
    """Outputs and the gradients of all leaves. Leaves keep their strides."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    outs = function(leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    # The reference of nothing has no graph: its gradients are zeros.
    pairs = [(o, g.to(o)) for g, o in zip(grads, outs, strict=True) if o.requires_grad]
    if not pairs:
        return [*outs, *map(torch.zeros_like, leaves.values())]
    wanted = list(leaves.values())
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return [*outs, *gradients]


def compare(call, leaves, grads, terms=0.0):
    """``call(module, leaves)`` for ours and the reference, in the inputs' dtype and in float64."""
    with poisoned_memory():
        ours = results(lambda x: call(ops, x), leaves, grads)
    same = results(lambda x: call(ref, x), leaves, grads)
    exact_grads = [g.to(o.dtype).double() for g, o in zip(grads, ours, strict=False)]
    exact = results(lambda x: call(ref, x), {k: t.double() for k, t in leaves.items()}, exact_grads)
    names = [f"output {i}" for i in range(len(grads))] + [f"gradient of {name}" for name in leaves]
    for name, a, b, c in zip(names, ours, same, exact, strict=True):
        assert_accurate(a, b, c, what=name, terms=terms)
    return ours


@st.composite
def packed(draw, tokens):
    """None, or offsets of sequences of any length, empty ones among them."""
    if not draw(st.booleans()):
        return None
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
    return torch.tensor([0, *cuts, tokens], dtype=torch.int32)


@st.composite
def shapes(draw):
    tokens = draw(st.sampled_from(LENGTHS))
    offsets = draw(packed(tokens))
    batch = draw(st.integers(0, 3)) if offsets is None else 1
    channels = draw(st.sampled_from(CHANNELS))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    parameter = torch.float32 if draw(st.booleans()) and dtype != torch.float64 else dtype
    return batch, tokens, channels, dtype, parameter, draw(st.sampled_from(LAYOUTS)), offsets


def sequences(batch, offsets):
    return batch if offsets is None else len(offsets) - 1


# ---------------------------------------------------------------- convolution


@given(shapes(), st.integers(2, 8), st.booleans(), st.booleans(), st.sampled_from([None, "silu"]))
def test_causal_conv1d(shape, width, with_bias, with_initial, activation):
    batch, tokens, channels, dtype, parameter, layout, offsets = shape
    leaves = {"x": rows(batch, tokens, channels, dtype, layout), "weight": torch.randn(channels, width).to(parameter)}
    if with_bias:
        leaves["bias"] = torch.randn(channels).to(parameter)
    if with_initial:
        leaves["initial_state"] = rows(sequences(batch, offsets), width - 1, channels, dtype)

    def call(module, x):
        return module.causal_conv1d(**x, activation=activation, offsets=offsets)

    (out, *_) = compare(call, leaves, [torch.randn(batch, tokens, channels)], terms=4.0 * max(1, tokens) ** 0.5)
    assert out.is_contiguous()


def test_convolution_agrees_with_torch():
    x, weight, bias = torch.randn(2, 20, 9), torch.randn(9, 4), torch.randn(9)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=9).mT
    torch.testing.assert_close(ops.causal_conv1d(x, weight, bias), expected)
    torch.testing.assert_close(ops.causal_conv1d(x, weight, bias, activation="silu"), F.silu(expected))


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 20])
def test_convolution_goes_on_from_its_state(cut):
    x, weight = torch.randn(2, 20, 9), torch.randn(9, 4)
    first = ops.causal_conv1d(x[:, :cut], weight)
    state = ops.convolution_state(x[:, :cut], 4)
    second = ops.causal_conv1d(x[:, cut:], weight, initial_state=state)
    assert torch.equal(torch.cat([first, second], 1), ops.causal_conv1d(x, weight))
    assert torch.equal(ops.convolution_state(x[:, cut:], 4, state), ops.convolution_state(x, 4))


# ---------------------------------------------------------------- scan


def scan_leaves(batch, tokens, channels, states, dtype, parameter, layout, offsets, parts):
    leaves = {
        "x": rows(batch, tokens, channels, dtype, layout),
        "dt": rows(batch, tokens, channels, dtype),
        "A": -torch.rand(channels, states).to(parameter) * 2,
        "B": rows(batch, tokens, states, dtype, layout),
        "C": rows(batch, tokens, states, dtype, layout),
    }
    if "D" in parts:
        leaves["D"] = torch.randn(channels).to(parameter)
    if "z" in parts:
        leaves["z"] = rows(batch, tokens, channels, dtype, layout)
    if "dt_bias" in parts:
        leaves["dt_bias"] = torch.randn(channels).to(parameter) - 1
    if "initial_state" in parts:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves["initial_state"] = torch.randn(sequences(batch, offsets), channels, states, dtype=wide)
    return leaves


PARTS = ["D", "z", "dt_bias", "initial_state"]


@given(shapes(), st.sampled_from([1, 2, 5, 16, 20]), st.sets(st.sampled_from(PARTS)), st.booleans())
def test_selective_scan(shape, states, parts, softplus):
    batch, tokens, channels, dtype, parameter, layout, offsets = shape
    leaves = scan_leaves(batch, tokens, channels, states, dtype, parameter, layout, offsets, parts)
    if not softplus:
        leaves["dt"] = F.softplus(leaves["dt"].float()).to(dtype)
        leaves.pop("dt_bias", None)
    grads = [torch.randn(batch, tokens, channels), torch.randn(sequences(batch, offsets), channels, states)]

    def call(module, x):
        return module.selective_scan(**x, dt_softplus=softplus, return_final_state=True, offsets=offsets)

    (out, final, *_) = compare(call, leaves, grads, terms=4.0 * max(1, tokens) ** 0.5)
    assert out.is_contiguous() and final.is_contiguous() and final.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("states", [64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_states(states, dtype):
    leaves = scan_leaves(2, 21, 40, states, dtype, torch.float32, "sliced", None, PARTS)
    compare(lambda m, x: m.selective_scan(**x, dt_softplus=True), leaves, [torch.randn(2, 21, 40)], terms=30.0)


def test_only_the_final_state_is_used():
    leaves = scan_leaves(2, 30, 5, 3, torch.float32, torch.float32, "plain", None, ["z"])
    compare(
        lambda m, x: m.selective_scan(**x, dt_softplus=True, return_final_state=True)[1],
        leaves,
        [torch.randn(2, 5, 3)],
        terms=10.0,
    )


def test_gradients_of_nothing():
    # The gradient of a sum is expanded, and has no stride of 1 where there is nothing.
    for shape in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        x = torch.randn(shape, requires_grad=True)
        A, B = -torch.rand(shape[2], 4, requires_grad=True), torch.randn(*shape[:2], 4, requires_grad=True)
        out, final = ops.selective_scan(x, x, A, B, B, return_final_state=True)
        gradients = torch.autograd.grad(out.sum() + final.sum(), [x, A, B])
        assert not any(g.any() for g in gradients)
        ops.causal_conv1d(x, torch.randn(shape[2], 4)).sum().backward()


def test_gradcheck():
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    for packing in (None, offsets):
        batch = 2 if packing is None else 1
        leaves = scan_leaves(batch, 7, 3, 2, torch.float64, torch.float64, "plain", packing, PARTS)
        inputs = {k: t.requires_grad_() for k, t in leaves.items()}

        def call(*tensors, names=tuple(inputs), packing=packing, final=True):
            named = dict(zip(names, tensors, strict=True))
            return ops.selective_scan(**named, dt_softplus=True, return_final_state=final, offsets=packing)

        assert torch.autograd.gradcheck(call, list(inputs.values()))
        assert torch.autograd.gradcheck(lambda *t, f=call: f(*t, final=False), list(inputs.values()))
        x, weight, bias, before = (
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((batch, 7, 3), (3, 4), (3,), (sequences(batch, packing), 3, 3))
        )
        for activation in (None, "silu"):
            assert torch.autograd.gradcheck(
                lambda x, w, b, s, a=activation, p=packing: ops.causal_conv1d(
                    x, w, b, activation=a, initial_state=s, offsets=p
                ),
                [x, weight, bias, before],
            )


@pytest.mark.parametrize("cut", [0, 1, 64, 99, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_goes_on_from_its_state(cut, dtype):
    leaves = scan_leaves(2, 100, 20, 16, dtype, torch.float32, "plain", None, ["D", "z", "dt_bias"])

    def part(begin, end, **more):
        cut_leaves = {k: t[:, begin:end] if t.dim() == 3 else t for k, t in leaves.items()}
        return ops.selective_scan(**cut_leaves, dt_softplus=True, return_final_state=True, **more)

    whole, final = part(0, 100)
    first, state = part(0, cut)
    second, last = part(cut, 100, initial_state=state)
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(last, final)


def test_packed_sequences_know_nothing_of_each_other():
    lengths = [5, 0, 70, 1]
    offsets = torch.tensor([0, 5, 5, 75, 76], dtype=torch.int32)
    leaves = scan_leaves(1, 76, 33, 16, torch.float32, torch.float32, "plain", offsets, PARTS)
    out, final = ops.selective_scan(**leaves, dt_softplus=True, return_final_state=True, offsets=offsets)
    for s, length in enumerate(lengths):
        begin = int(offsets[s])
        own = {k: t[:, begin : begin + length] if k in ("x", "dt", "B", "C", "z") else t for k, t in leaves.items()}
        own["initial_state"] = leaves["initial_state"][s : s + 1]
        alone, state = ops.selective_scan(**own, dt_softplus=True, return_final_state=True)
        assert torch.equal(alone, out[:, begin : begin + length]) and torch.equal(state[0], final[s])


@given(st.integers(0, 3), st.sampled_from(CHANNELS), st.sampled_from([1, 5, 16, 64, 200]), st.sampled_from(DTYPES))
def test_steps_equal_the_scan(batch, channels, states, dtype):
    leaves = scan_leaves(batch, 3, channels, states, dtype, dtype, "sliced", None, PARTS)
    exact = {k: t.double() for k, t in leaves.items()}

    def steps(module, leaves, state):
        outs = []
        for t in range(3):
            x, dt, B, C, z = (leaves[k][:, t] for k in ("x", "dt", "B", "C", "z"))
            out, state = module.selective_step(state, x, dt, leaves["A"], B, C, leaves["D"], z, leaves["dt_bias"], True)
            outs.append(out)
        return torch.stack(outs, 1), state

    with poisoned_memory():
        ours = steps(ops, leaves, leaves["initial_state"])
    same, right = steps(ref, leaves, leaves["initial_state"]), steps(ref, exact, exact["initial_state"])
    for a, b, c in zip(ours, same, right, strict=True):
        assert_accurate(a, b, c, terms=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_step_sizes_are_defined(dtype):
    leaves = scan_leaves(1, 6, 40, 4, dtype, dtype, "plain", None, ["D", "z"])
    leaves["dt"][0, 2, :8] = 6e4  # everything before is forgotten
    leaves["dt"][0, 3, 8:16] = -6e4  # softplus is 0: nothing is forgotten, nothing added
    leaves["dt"][0, 1, 16:24] = 1e-7
    grads = [torch.randn(1, 6, 40)]
    compare(lambda m, x: m.selective_scan(**x, dt_softplus=True), leaves, grads, terms=1e-4 * 6e4)


def test_small_step_sizes_keep_their_relative_accuracy():
    dt = torch.linspace(-16, 4, 1000)[None, :, None].expand(1, 1000, 16).contiguous()
    one = torch.ones(1, 1000, 16)
    # A huge decay forgets all but the token itself: out = softplus(dt).
    out = ops.selective_scan(one, dt, torch.full((16, 1), -1e30), one[..., :1], one[..., :1], dt_softplus=True)
    exact = F.softplus(dt.double())
    assert ((out.double() - exact).abs() / exact).max() < 1e-6


def test_growing_states_and_infinities():
    # A > 0 is no stable model, but its numbers are right, up to and beyond the largest.
    x = torch.ones(1, 3, 20)
    for rate in (1.0, 80.0, 88.0, 200.0):
        A = torch.full((20, 1), rate)
        out = ops.selective_scan(x, x, A, x[..., :1], x[..., :1])
        expected = ref.selective_scan(
            x, x, A, x[..., :1], x[..., :1]
        )  # inf * 0 = NaN at once where the decay overflows
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_channel_and_after_its_token(value):
    leaves = scan_leaves(1, 9, 40, 4, torch.float32, torch.float32, "plain", None, ["D", "z"])
    clean = ops.selective_scan(**leaves, dt_softplus=True)
    leaves["dt"][0, 4, 17] = value
    out = ops.selective_scan(**leaves, dt_softplus=True)
    expected = ref.selective_scan(**leaves, dt_softplus=True)
    assert torch.equal(out.isnan(), expected.isnan())
    untouched = torch.ones(1, 9, 40, dtype=torch.bool)
    untouched[0, 4:, 17] = False
    assert torch.equal(out[untouched], clean[untouched])


def test_threads_do_not_change_the_result():
    leaves = scan_leaves(3, 90, 200, 16, torch.float32, torch.float32, "plain", None, PARTS)
    conv = {"x": leaves["x"], "weight": torch.randn(200, 4), "bias": torch.randn(200)}
    before, runs = torch.get_num_threads(), []
    torch.manual_seed(1)
    grads = [torch.randn(3, 90, 200)]
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(
                results(lambda x: ops.selective_scan(**x, dt_softplus=True), leaves, grads)
                + results(lambda x: ops.causal_conv1d(**x, activation="silu"), conv, grads)
            )
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def test_offsets_beyond_two_to_the_31():
    # Only a page of each row is touched: the strides, not the memory, are large.
    count, stride = 3, 2**30 + 8
    storage = torch.empty(count * stride, dtype=torch.bfloat16)
    big = storage.as_strided((count, 9, 16), (stride, 16, 1))
    big.copy_(torch.randn(count, 9, 16))
    small, A, weight = big.clone(), -torch.rand(16, 16), torch.randn(16, 4)
    assert torch.equal(ops.selective_scan(big, big, A, big, big), ops.selective_scan(small, small, A, small, small))
    assert torch.equal(ops.causal_conv1d(big, weight), ops.causal_conv1d(small, weight))


@pytest.mark.parametrize("isa", ["v2", "v3", "v4"])
def test_instruction_sets_agree(isa):
    import os
    import subprocess
    import sys

    code = (
        "import torch; from effcore.ops import scan as o; torch.manual_seed(0);"
        "r = lambda *s: torch.randn(s, requires_grad=True);"
        "x, dt, B, C, z = r(2, 70, 37), r(2, 70, 37), r(2, 70, 5), r(2, 70, 5), r(2, 70, 37);"
        "A = (-torch.rand(37, 5)).requires_grad_();"
        "u = o.causal_conv1d(x, torch.ones(37, 4) / 4, activation='silu');"
        "y = o.selective_scan(u, dt, A, B, C, z=z, dt_softplus=True);"
        "g = torch.autograd.grad(y.square().sum(), [x, dt, A, B, C, z]);"
        "print(*[float(t.double().abs().sum()) for t in (y, *g)])"
    )

    def run(isa):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"EFFCORE_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        return torch.tensor([float(x) for x in done.stdout.split()])

    torch.testing.assert_close(run(isa), run("of this machine"), rtol=1e-5, atol=0)
