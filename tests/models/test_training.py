"""Training: checkpointing, compiled pieces, whole-model graphs, the Trainer, LoRA."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from effcore import share_activations
from effcore.models import SharedLlamaForCausalLM
from effcore.models import layer as layer_module
from tests.models.tiny import (
    LAYERS,
    SHARINGS,
    assert_same_gradients,
    gradients,
    hf_model,
    loss_of,
    oracle_logits,
    shared_model,
    tokens,
)


def run(model, ids):
    out = model(ids, labels=ids)
    return out.loss.detach(), gradients(model, out.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_checkpointing_changes_no_gradient(sharing, dtype):
    model, ids = shared_model(sharing, "qwen3", dtype).train(), tokens()
    want_loss, want = run(model, ids)
    for every in (1, 2):
        model.activation_checkpointing_enable(every_n_layers=every)
        loss, got = run(model, ids)
        torch.testing.assert_close(loss, want_loss)
        assert_same_gradients(got, want, rtol=1e-6 if dtype == torch.float64 else 1e-4, atol=1e-6)
    model.activation_checkpointing_disable()
    assert_same_gradients(run(model, ids)[1], want, rtol=0, atol=0)
    # And the plain-torch gradient, since checkpointing could share a mistake with the run that it is compared to.
    assert_same_gradients(want, gradients(model, loss_of(oracle_logits(model, ids), ids)), rtol=1e-3, atol=1e-5)


def test_checkpointing_keeps_no_probabilities(monkeypatch):
    model, ids = shared_model("qk").train(), tokens()
    kept = []
    original = layer_module.ops.attention_with_scores
    monkeypatch.setattr(
        layer_module.ops,
        "attention_with_scores",
        lambda *a, **k: (kept.append(k["keep"]), original(*a, **k))[1],
    )
    model(ids)
    model.activation_checkpointing_enable()
    model(ids)
    model.eval()(ids)
    assert kept == ["auto", "lse", "auto"]


def test_reentrant_checkpointing_is_refused_by_name():
    model = shared_model("qk")
    for enable in (model.activation_checkpointing_enable, model.model.activation_checkpointing_enable):
        with pytest.raises(ValueError, match="use_reentrant=True loses the gradients"):
            enable({"use_reentrant": True})
    assert not model.model.gradient_checkpointing
    model.train().activation_checkpointing_enable()
    with torch.no_grad():
        cache = model.eval()(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values cannot be used while training with gradient checkpointing"):
        model.train()(tokens(), past_key_values=cache)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_whole_model_as_one_graph(sharing):
    torch._dynamo.reset()
    model, ids = shared_model(sharing).train(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want_loss, want = run(model, ids)
    loss, got = run(compiled, ids)
    torch.testing.assert_close(loss, want_loss)
    got = {n.removeprefix("_orig_mod."): g for n, g in got.items()}
    assert_same_gradients(got, want, rtol=1e-4, atol=1e-6)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        for options in (
            {"attention_mask": mask},
            {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]])},
        ):
            torch.testing.assert_close(compiled(ids, **options).logits, model(ids, **options).logits)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["qk", "kv"])
def test_whole_model_with_inductor(sharing):
    torch._dynamo.reset()
    model, ids = shared_model(sharing).train(), tokens()
    want_loss, want = run(model, ids)
    loss, got = run(torch.compile(model, fullgraph=True), ids)
    torch.testing.assert_close(loss, want_loss)
    assert_same_gradients({n.removeprefix("_orig_mod."): g for n, g in got.items()}, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}]
)
def test_pieces_are_no_cuda_graphs(options):
    model = share_activations(hf_model(), mode="qk", shared=2)
    with pytest.raises(ValueError, match="the next call overwrites"):
        model.compile_pieces(**options)
    assert all(layer.pieces is layer_module.PIECES for layer in model.model.layers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["qk", "kv"])
def test_a_growing_region_compiles_nothing_anew(mode, checkpointing):
    """The graphs of the pieces around attention serve every region length: none is made after the first growth."""
    torch._dynamo.reset()
    model, eager = (share_activations(hf_model(), mode=mode, shared=0).train() for _ in range(2))
    ids = tokens()
    counter = CompileCounterWithBackend("aot_eager")
    assert model.compile_pieces(backend=counter) is model
    if checkpointing:
        model.activation_checkpointing_enable()
    graphs = []
    for shared in (0, 1, 2, 3, 4, 2, 0):
        for m in (model, eager):
            m.set_layout(LAYERS - shared)
        loss, got = run(model, ids)
        want_loss, want = run(eager, ids)
        torch.testing.assert_close(loss, want_loss)
        assert_same_gradients(got, want, rtol=1e-4, atol=1e-6)
        graphs.append(counter.frame_count)
    # norm + QKV, output + MLP and the loss at first; norm + V (or norm + Q) with the first consumer; then nothing more.
    assert graphs == [3, 4, 4, 4, 4, 4, 4]
    for layout in ("0_0_2_2_4", "0_0_0_3_3"):
        model.set_layout(layout)
        run(model, ids)
    assert counter.frame_count == 4


def test_gradients_are_not_copied_between_compiled_pieces():
    """Queries, keys and values leave a piece in the order in which their gradients come back."""
    torch._dynamo.reset()
    model, ids = share_activations(hf_model(), mode="qk", start=LAYERS - 2).train(), tokens()
    model.compile_pieces(backend="aot_eager")
    run(model, ids)
    config = model.config
    sizes = {
        ids.numel() * heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    }
    with torch.profiler.profile(record_shapes=True) as profiler:
        run(model, ids)
    copied = [e.input_shapes[0] for e in profiler.events() if e.name in ("aten::clone", "aten::contiguous")]
    assert copied  # the profiler saw something
    assert [shape for shape in copied if len(shape) == 4 and math.prod(shape) in sizes] == []


def test_loss_counts_items_as_transformers_does():
    original, ids = hf_model(), tokens()
    model = share_activations(original, shared=0, inplace=False)
    for options in ({}, {"num_items_in_batch": 7}):
        torch.testing.assert_close(model(ids, labels=ids, **options).loss, original(ids, labels=ids, **options).loss)


def corpus(rows=16, length=12):
    ids = tokens(1, 1)[0, 0] + torch.arange(rows)[:, None] + 2 * torch.arange(length)
    return [{"input_ids": r, "labels": r} for r in (ids % 90 + 3)]


@pytest.mark.parametrize("sharing", ["qk", "kv"])
def test_hf_trainer(sharing, tmp_path):
    model = shared_model(sharing)
    off = {n: p.clone() for n, p in model.switched_off_parameters()}
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.5,
        gradient_checkpointing=True,
        save_steps=6,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=corpus())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(off[n], p) for n, p in model.switched_off_parameters())
    loaded = SharedLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    ids = tokens()
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)
    # Resuming from the middle gives the same losses.
    again = Trainer(model=shared_model(sharing), args=arguments, train_dataset=corpus())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed[-6:] == pytest.approx(losses[-6:], rel=1e-5)


def test_trainer_packs_documents(tmp_path):
    """transformers' packing collator gives position ids that start anew, and optionally the offsets."""
    rows = [{"input_ids": r["input_ids"].tolist()} for r in corpus(4)]
    model = shared_model("qk")
    apart = [model(torch.tensor([r["input_ids"]])).logits for r in rows]
    for offsets in (False, True):
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=offsets, return_tensors="pt")(rows)
        torch.testing.assert_close(model(**batch).logits, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharing", ["qk", "kv"])
def test_lora(sharing, tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = shared_model(sharing), tokens()
    plain = base(ids).logits
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(input_ids=ids).logits, plain)
    model.train()
    model.base_model.model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    off = base.switched_off_parameters()
    assert any("lora_" in n for n, _ in off) and all(p.grad is None for _, p in off)
    assert all(
        p.grad is not None
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in {id(o) for _, o in off}
    )
    model.eval()
    want = model(input_ids=ids).logits
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids=ids, **options), model.generate(input_ids=ids, **options, use_cache=False)
    )
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(shared_model(sharing), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, want)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="convert the model first and wrap it then"):
        share_activations(loaded, start=3)
