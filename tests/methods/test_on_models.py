"""The schedules on real models: gradients, callbacks and loops alike, distillation, what is dropped at the end."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import effcore
from effcore.methods.echo_llama import ECHOSchedule
from effcore.methods.epas import EPASSchedule, StaticSchedule


def tiny(mode: str, layers: int = 4):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return effcore.share_activations(LlamaForCausalLM(config), mode=mode, shared=0)


def windows(count: int, length: int = 16):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def loop(model, schedule, data, *, batch=2):
    """The plain loop that the Trainer below must agree with."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    model.train()
    for step in range(len(data) // batch):
        schedule.apply(model, optimizer, step)
        ids = torch.stack([item["input_ids"] for item in data[step * batch : (step + 1) * batch]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("mode", ["qk", "kv"])
def test_callback_equals_loop(mode, tmp_path):
    schedules = [
        EPASSchedule(4, switch_every=2, max_shared=2) if mode == "qk" else ECHOSchedule(4, 2, 2) for _ in range(2)
    ]
    data = windows(16)
    by_hand = loop(tiny(mode), schedules[0], data)
    model = tiny(mode)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = InOrder(
        model, arguments, train_dataset=data, callbacks=[schedules[1].callback()], optimizers=(optimizer, constant)
    )
    trainer.train()
    assert str(model.layout) == str(by_hand.layout) == "0_1_1_1"
    for (name, one), (_, other) in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("mode", "off"), [("qk", {"q_proj", "k_proj"}), ("kv", {"k_proj", "v_proj"})])
def test_no_gradient_reaches_switched_off_projections(mode, off):
    model = tiny(mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    ids = torch.stack([item["input_ids"] for item in windows(2)])
    for schedule in (StaticSchedule("0_1_2_3"), StaticSchedule("0_1_1_1")):
        schedule.apply(model, optimizer, 0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(input_ids=ids, labels=ids).loss.backward()
        still = {name for name, p in model.named_parameters() if p.grad is None}
        optimizer.step()
        optimizer.zero_grad()
        unchanged = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert still == unchanged
        expected = {f"model.layers.{i}.self_attn.{name}.weight" for i in (2, 3) for name in off}
        assert still == (expected if schedule.fixed == "0_1_1_1" else set())
        assert len(optimizer.state) == len(before) - len(still)


def test_blockwise_layout_trains():
    model = loop(tiny("kv", layers=6), StaticSchedule("0_0_2_2_4_4"), windows(4))
    assert model.layout.groups == {0: (1,), 2: (3,), 4: (5,)}


def test_distillation_term_is_zero_where_nothing_changes_and_pulls_otherwise():
    ids = torch.stack([item["input_ids"] for item in windows(2)])
    model = tiny("kv").train()
    with torch.no_grad():  # layer 3 is given layer 2's keys and values anyway
        upper, lower = model.model.layers[3], model.model.layers[2]
        for name in ("k_proj", "v_proj"):
            getattr(upper.self_attn, name).weight.zero_()
            getattr(lower.self_attn, name).weight.zero_()
    schedule = ECHOSchedule(4, final_start=2, steps_per_stage=2, distillation=0.5)
    schedule.apply(model, None, 0)
    model(input_ids=ids, labels=ids)
    assert schedule.extra_loss().item() == 0
    assert schedule.extra_loss() is None  # taken

    model = tiny("kv").train()
    schedule = ECHOSchedule(4, final_start=2, steps_per_stage=30, distillation=1.0)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "layers.3" in n], lr=1e-2)
    terms = []
    for step in range(30):
        schedule.apply(model, optimizer, step)
        model(input_ids=ids, labels=ids)
        term = schedule.extra_loss()
        terms.append(term.item())
        term.backward()
        optimizer.step()
        model.zero_grad()
    assert terms[-1] < 0.7 * terms[0]
    schedule.apply(model, optimizer, 60)  # past the last stage
    model(input_ids=ids, labels=ids)
    assert schedule.extra_loss() is None
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_distillation_gradient_is_that_of_the_formula():
    model = tiny("kv").train()
    ids = torch.stack([item["input_ids"] for item in windows(2)])
    schedule = ECHOSchedule(4, final_start=2, steps_per_stage=2, distillation=0.7)
    schedule.apply(model, None, 0)
    model(input_ids=ids, labels=ids)
    schedule.extra_loss().backward()
    ours = model.model.layers[3].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()

    with torch.no_grad():
        full = StaticSchedule("0_1_2_3")
        full.apply(model, None, 0)
        captured = []
        handle = model.model.layers[3].register_forward_hook(lambda _, args, out: captured.append((args[0], out[0])))
        model(input_ids=ids)
        own_input, own = captured.pop()
    StaticSchedule("0_1_2_2").apply(model, None, 0)
    model(input_ids=ids)
    entering, out = captured.pop()
    handle.remove()
    assert torch.equal(entering, own_input)
    (0.7 * (out - own).square().mean() / (own - own_input).square().mean()).backward()
    torch.testing.assert_close(ours, model.model.layers[3].self_attn.q_proj.weight.grad)
    assert model.model.layers[3].self_attn.k_proj.weight.grad is None


def test_distillation_under_checkpointing_and_in_a_second_model():
    ids = torch.stack([item["input_ids"] for item in windows(2)])
    schedule, found = ECHOSchedule(4, final_start=2, steps_per_stage=2, distillation=0.7), []
    for checkpointing in (False, True):
        model = tiny("kv").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        schedule.apply(model, None, 0)
        for _ in range(2):
            (model(input_ids=ids, labels=ids).loss + schedule.extra_loss()).backward()
        assert schedule.extra_loss() is None  # the backward left none
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])
    model(input_ids=ids)
    with pytest.warns(UserWarning, match=r"was added to no loss; add schedule.extra_loss\(\)"):
        model(input_ids=ids)


def test_finish_drops_the_projections_from_the_checkpoint(tmp_path):
    model = loop(tiny("kv"), ECHOSchedule(4, 2, 1), windows(4))
    schedule = ECHOSchedule(4, 2, 1)
    schedule.finish(model)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    gone = {f"model.layers.{i}.self_attn.{p}.weight" for i in (2, 3) for p in ("k_proj", "v_proj")}
    assert not names & gone
    assert "model.layers.1.self_attn.k_proj.weight" in names
    again = type(model).from_pretrained(tmp_path).eval()
    ids = windows(1)[0]["input_ids"][None]
    assert torch.equal(model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)


def test_the_callback_unwraps_no_wrapper_of_the_user():
    from types import SimpleNamespace

    from effcore.methods.callback import EachStep

    seen, wrapper = [], SimpleNamespace(optimizer="inner")
    each = EachStep(lambda model, state, optimizer: seen.append(optimizer))
    each.on_step_begin(None, None, None, model=None, optimizer=wrapper)
    assert seen == [wrapper]
