"""What the models compute: logits and gradients against the same computation in plain torch; masks, documents, windows."""

from copy import deepcopy

import pytest
import torch

from effcore import share_activations
from effcore.models import layer
from tests.models.tiny import (
    FAMILIES,
    SHARINGS,
    assert_same_gradients,
    gradients,
    hf_model,
    loss_of,
    oracle_logits,
    shared_model,
    tokens,
)
from tests.support import assert_accurate

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_logits_and_gradients_equal_plain_torch(sharing, family):
    model, ids = shared_model(sharing, family, torch.float64), tokens()
    out = model(ids, labels=ids)
    want = oracle_logits(model, ids)
    torch.testing.assert_close(out.logits, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, loss_of(want, ids).to(out.loss.dtype), rtol=1e-5, atol=1e-5)
    got = gradients(model, model(ids, labels=ids).loss)
    assert_same_gradients(got, gradients(model, loss_of(oracle_logits(model, ids), ids)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_sharing_changes_the_logits(sharing):
    """The tests above can fail: what is shared matters in these tiny models."""
    ids = tokens()
    plain = hf_model()(ids).logits
    difference = (shared_model(sharing)(ids).logits - plain).abs().max()
    assert difference > 0.1


def test_switched_off_projections_get_no_gradient():
    for sharing, names in (("qk", ("q_proj", "k_proj")), ("kv", ("k_proj", "v_proj"))):
        model, ids = shared_model(sharing, "qwen3"), tokens()
        got = gradients(model, model(ids, labels=ids).loss)
        off = dict(model.switched_off_parameters())
        assert {n for n, g in got.items() if g is None} == off.keys()
        norms = ("q_norm", "k_norm") if sharing == "qk" else ("k_norm",)
        assert {n.split(".")[-2] for n in off} == {*names, *norms}
        assert {n.split(".")[2] for n in off} == {"3", "4"}
        assert all(p is dict(model.named_parameters())[n] for n, p in off.items())


def test_a_longer_region_clears_stale_gradients():
    model, ids = shared_model("qk"), tokens()
    model.set_layout(5)
    assert not model.switched_off_parameters()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.set_layout(3)
    assert len(model.switched_off_parameters()) == 4
    assert all(p.grad is None for _, p in model.switched_off_parameters())
    before = [p.clone() for _, p in model.switched_off_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(b, p) for b, (_, p) in zip(before, model.switched_off_parameters(), strict=True))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_layout_at_run_time(sharing):
    """Any region length runs with the same weights, and equals a model that was made with it."""
    mode, owner, layout = SHARINGS[sharing]
    model, ids = shared_model(sharing), tokens()
    trained = model(ids).logits
    for start in (1, 4, 5):
        other = share_activations(hf_model(), mode=mode, owner=owner, start=start)
        if owner == "projection" and start < 5:
            with pytest.raises(ValueError, match="no projection"):
                model.set_layout(start)
            continue
        with model.using_layout(start):
            assert str(model.layout) == model.config.share_layout == str(other.layout)
            torch.testing.assert_close(model(ids).logits, other(ids).logits)
    assert str(model.layout) == layout
    torch.testing.assert_close(model(ids).logits, trained, rtol=0, atol=0)


def test_another_layout_for_some_calls_keeps_gathered_gradients():
    model, ids = shared_model(), tokens()
    model(ids, labels=ids).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with model.using_layout(1), torch.no_grad():
        model(ids)
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-windows"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_left_padding_equals_no_padding(sharing, family):
    model, short = shared_model(sharing, family), tokens(1, 9)
    alone = model(short).logits
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    ids = torch.cat([ids, tokens(1, 13, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for options in ({}, {"position_ids": positions}, {"use_cache": True}):
        logits = model(ids, attention_mask=mask, **options).logits
        torch.testing.assert_close(logits[:1, 4:], alone, **CLOSE)
        torch.testing.assert_close(logits[1:], model(ids[1:]).logits, **CLOSE)
    for kind in (torch.bool, torch.float32):
        torch.testing.assert_close(model(ids, attention_mask=mask.to(kind)).logits[:1, 4:], alone, **CLOSE)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_padding_gets_no_say_in_gradients(sharing):
    """Left and right padding change neither loss nor gradients."""
    model, short = shared_model(sharing, dtype=torch.float64), tokens(1, 9)
    want = gradients(model, model(short, labels=short).loss)
    pad, zeros = torch.full((1, 4), 7), torch.zeros(1, 4, dtype=torch.long)
    for order in ("left", "right"):
        parts = [(pad, zeros, torch.full((1, 4), -100)), (short, torch.ones_like(short), short)]
        ids, mask, labels = (torch.cat(p, 1) for p in zip(*(parts if order == "left" else parts[::-1]), strict=True))
        got = gradients(model, model(ids, attention_mask=mask, labels=labels).loss)
        if order == "left":  # the padding's last position predicts the first token: not part of the unpadded loss
            labels[0, 4] = -100
            got = gradients(model, model(ids, attention_mask=mask, labels=labels).loss)
        assert_same_gradients(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_packed_documents_do_not_see_each_other(sharing, family):
    model = shared_model(sharing, family)
    documents = [tokens(1, n, seed=n) for n in (4, 1, 8)]
    apart = torch.cat([model(d).logits for d in documents], 1)
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    names = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)], 1)
    offsets = torch.tensor([0, 4, 5, 13], dtype=torch.int32)
    for how in (
        {"position_ids": positions},
        {"document_ids": names},
        {"cu_seqlens": offsets},
        {"position_ids": positions, "cu_seqlens": offsets},
        {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 8, "max_length_k": 8},
    ):
        torch.testing.assert_close(model(packed, **how).logits, apart, **CLOSE)
    assert (model(packed).logits - apart).abs().max() > 0.1
    first = torch.tensor([[0] * 4 + [4] + [5] * 8])
    torch.testing.assert_close(oracle_logits(model, packed, first, positions), apart, **CLOSE)
    # Several packed rows, each with its own documents, and gradients that stay within a document.
    rows = torch.cat([packed, packed.roll(3, 1)])
    row_positions = torch.cat([positions, positions.roll(3, 1)])
    row_positions[1, :3] = torch.arange(3)  # the document that was cut in two is two documents now
    embedded = model.model.embed_tokens(rows).detach().requires_grad_()
    model(inputs_embeds=embedded, position_ids=row_positions).logits[:, 12].sum().backward()
    reached = embedded.grad.abs().sum(-1) > 0
    assert reached[0].tolist() == [False] * 5 + [True] * 8
    assert reached[1].tolist() == [False] * 8 + [True] * 5


def test_packed_documents_through_the_cache():
    """Chunks and single tokens of packed documents see what one pass sees."""
    for sharing in SHARINGS:
        model = shared_model(sharing)
        packed = tokens(1, 13)
        positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6, 7]])
        with torch.no_grad():
            want = model(packed, position_ids=positions, use_cache=False).logits
            for chunks in ([1] * 13, [6, 7], [4, 9], [2, 3, 8]):
                cache, got = None, []
                for ids, at in zip(packed.split(chunks, 1), positions.split(chunks, 1), strict=True):
                    out = model(ids, position_ids=at, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    got.append(out.logits)
                torch.testing.assert_close(torch.cat(got, 1), want, **CLOSE)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_autocast(sharing):
    model, ids = shared_model(sharing), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        cached = model(ids, use_cache=True)
        logits = model(ids, use_cache=False).logits
        with torch.no_grad():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            step = model(ids[:, -1:], past_key_values=cache).logits
    exact = model(ids).logits
    torch.testing.assert_close(cached.logits, logits)
    assert (logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.02
    assert (step.float() - exact[:, -1:]).abs().mean() < 0.05 * exact.abs().mean() + 0.02


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention_mask": torch.zeros(2, 1, 13, 13)}, ValueError, "must be 2D .* got 4D"),
        ({"attention_mask": torch.ones(2, 12)}, ValueError, r"\[2, 13\].*got \(2, 12\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1] + [1] * 10] * 2)}, ValueError, "hole"),
        ({"attention_mask": torch.full((2, 13), -1e9)}, ValueError, "zeros and ones"),
        ({"position_ids": torch.zeros(3, 13)}, ValueError, r"position_ids must be \[2, 13\]"),
        ({"position_ids": torch.zeros(2, 5)}, ValueError, r"position_ids must be \[2, 13\]"),
        ({"document_ids": torch.zeros(2, 5)}, ValueError, r"document_ids must be \[2, 13\]"),
        ({"cu_seqlens": torch.tensor([0, 13])}, ValueError, "batch of 1"),
        ({"inputs_embeds": torch.zeros(2, 13, 48)}, ValueError, "exactly one of"),
        ({"output_attentions": True}, TypeError, "output_attentions"),
        ({"attention_maks": None}, TypeError, "attention_maks"),
        ({"past_key_values": ()}, TypeError, "must be an effcore.models.SharedCache, got tuple"),
    ],
)
def test_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        shared_model()(tokens(), **arguments)


def test_offsets_of_documents_are_checked():
    model, ids = shared_model(), tokens(1)
    for offsets in ([0, 5], [1, 13], [0, 9, 4, 13], []):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 13 tokens"):
            model(ids, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match="not both"):
        model(ids, cu_seqlens=torch.tensor([0, 13]), document_ids=torch.zeros(1, 13))
    cache = model(ids, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ValueError, match="with a cache give position_ids"):
        model(ids, document_ids=torch.zeros(1, 13), past_key_values=cache)


def test_a_row_of_padding_alone_changes_nothing_else():
    model, ids = shared_model(), tokens()
    mask = torch.ones_like(ids)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, **CLOSE)


def test_layers_that_share_nothing_give_the_same_with_sdpa(monkeypatch):
    model, ids = shared_model("qk", "llama-mha-bias", torch.bfloat16), tokens(length=12)
    results, calls = {}, []

    def counted(*arguments, **options):
        calls.append(options)
        return torch.nn.functional.scaled_dot_product_attention(*arguments, **options)

    monkeypatch.setattr(layer, "scaled_dot_product_attention", counted)
    for faster in (False, True):
        monkeypatch.setattr(layer.plan, "sdpa_is_faster", lambda *_, faster=faster: faster)
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        results[faster] = out.logits, model.model.layers[0].self_attn.q_proj.weight.grad
    assert len(calls) == 2  # layers 0 and 1 of 0_1_2_2_2; layer 2 owns a group
    exact = deepcopy(model).float()
    exact.zero_grad()
    out = exact(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    truth = out.logits, exact.model.layers[0].self_attn.q_proj.weight.grad
    for what, ours, sdpa, wide in zip(("logits", "gradient"), results[False], results[True], truth, strict=True):
        assert_accurate(ours, sdpa, wide, what=what)
        assert_accurate(sdpa, ours, wide, what=what)
    calls.clear()
    torch.use_deterministic_algorithms(True)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        torch.use_deterministic_algorithms(False)
    model(input_ids=ids, attention_mask=torch.tensor([[0] * 3 + [1] * 9, [1] * 12]), use_cache=False)
    assert not calls  # bits that repeat, and padding, take our kernels
