"""A task of Bayesian-MoE's claim: which of four lines comes next, for a small Qwen2-MoE that has learnt the text before.

Parameters are bfloat16, and learn through float32 copies of them.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks.claims._bayesian_task import Batch, Task
from benchmarks.claims._bayesian_text import (
    LENGTH,
    PAD,
    VOCABULARY,
    Sources,
    batches,
    encode_files,
    find_sources,
    learn_tokens,
    make_questions,
)
from benchmarks.claims._step import linear_decay
from effcore.methods.laplace_file import read_safetensors, write_safetensors

WINDOW = 512  # tokens of a row of text


def fresh(seed: int, device: str, *, width: int = 384, layers: int = 6, experts: int = 8) -> Any:
    import transformers as hf

    torch.manual_seed(seed)
    config = hf.Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128), num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=width,
        intermediate_size=2 * width, shared_expert_intermediate_size=width, max_position_embeddings=max(WINDOW, LENGTH),
        pad_token_id=PAD, tie_word_embeddings=True, router_aux_loss_coef=0.01, norm_topk_prob=True,
        experts_implementation="grouped_mm" if device.startswith("cuda") else "eager",
    )  # fmt: skip
    return hf.Qwen2MoeForCausalLM(config).to(device, torch.bfloat16 if device.startswith("cuda") else torch.float32)


class Optimizer:
    """AdamW on float32 copies of the parameters, with clipping at 1."""

    def __init__(self, model: nn.Module, weight_decay: float):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.copies = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.copies, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)

    def step(self, loss: Tensor, rate: float) -> None:
        loss.backward()
        for copy_, p in zip(self.copies, self.parameters, strict=True):
            copy_.grad = torch.zeros_like(copy_) if p.grad is None else p.grad.float()
            p.grad = None
        nn.utils.clip_grad_norm_(self.copies, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.copies)


def pretrain(
    model: Any, tokens: np.ndarray, *, steps: int, seconds: float, batch: int, rate: float, seed: int, compiled: bool
) -> dict:
    """Next-token prediction on windows drawn anywhere in the text, and the loss that keeps experts in balance: for so many
    steps, or as many as there is time for; the learning rate falls with whichever ends first."""
    device = next(model.parameters()).device
    text = torch.from_numpy(tokens.astype(np.int32)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer, places = Optimizer(model, 0.1), torch.arange(WINDOW + 1, device=device)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    model.train()
    losses: list[Tensor] = []
    began = time.perf_counter()
    for step in range(steps):
        if step == 1:  # the first has compiled
            began = time.perf_counter()
        at = max(step, int(steps * (time.perf_counter() - began) / seconds))
        if at >= steps:
            break
        first = torch.randint(len(text) - WINDOW, (batch, 1), device=device, generator=generator)
        ids = text[first + places].long()
        out = model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
        loss = nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.step(loss + model.router_aux_loss_coef * out.aux_loss, linear_decay(at, steps, peak=rate))
        losses.append(loss.detach())
        if step % 50 == 0:
            recent = torch.stack(losses[-50:]).mean().item()
            print(
                f"pretraining {step + 1} of {steps}: loss {recent:.3f}, balance {float(out.aux_loss.detach()):.3f}, "
                f"{(step + 1) * batch * WINDOW / 1e6:.1f}M tokens, {time.perf_counter() - began:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    loss_at_the_end = torch.stack(losses[-20:]).mean().item()
    return {"steps": len(losses), "tokens": len(losses) * batch * WINDOW, "loss": loss_at_the_end}


class Chooser(nn.Module):
    """Logits [B, 4]: one linear layer on the state of each candidate's last token, as GPT's first version chose answers."""

    def __init__(self, language_model: Any, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.body = copy.deepcopy(language_model.model)
        weight = next(self.body.parameters())
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(self.body.config.hidden_size, 1, bias=False).to(weight.device, weight.dtype)
        for layer in self.body.layers:
            layer.self_attn.attention_dropout = 0.1

    def forward(self, input_ids: Tensor, last: Tensor) -> Tensor:
        ids, last = input_ids.flatten(0, 1), last.flatten()
        states = self.body(input_ids=ids, use_cache=False).last_hidden_state  # padding is behind, where nobody looks
        state = states[torch.arange(len(ids), device=ids.device), last].view(*input_ids.shape[:2], -1)
        return self.head(self.dropout(state))[..., 0]


def logits_of(model: Any, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    return model(batch["input_ids"].to(device), batch["last"].to(device)).float()


def fine_tune(model: Any, data: list[Batch], epochs: int, rate: float, seed: int) -> Any:
    """AdamW and linear decay, for so many epochs."""
    device = next(model.parameters()).device
    data = [{name: t.to(device) for name, t in batch.items()} for batch in data]
    optimizer, steps, step = Optimizer(model, 0.01), epochs * len(data), 0
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in rng.sample(data, len(data)):
            loss = nn.functional.cross_entropy(logits_of(model, batch), batch["labels"])
            optimizer.step(loss, linear_decay(step, steps, peak=rate))
            step += 1
    return model.eval()


def with_adapters(language_model: Any, seed: int) -> Any:
    """A chooser that learns low-rank adapters of its attention, and the linear layer behind it, in place of all weights."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    return peft.get_peft_model(Chooser(language_model, seed), config)


def lines_task(
    folder: Path, *, train_on: int, test: int, batch: int, epochs: int, rate: float, device: str, pretraining: int,
    seconds: float, development: bool = False, most_bytes: int = 170 << 20, windows: int = 128, **size: int,
) -> Task:  # fmt: skip
    """The task, with what ``folder`` holds of it: tokens, questions and the language model, which are made where they are not
    there yet. ``development``: "test" and "other" are of files that are not scored otherwise."""
    tokens_file, weights_file = folder / "tokenizer.json", folder / "pretrained.safetensors"
    counts = {"train": train_on, "held": test // 2, "test": test, "other": test}
    scored = "development-" if development else ""
    files = {part: folder / f"{scored if part in ('test', 'other') else ''}{part}.jsonl" for part in counts}
    made = [tokens_file, weights_file, *files.values()]
    sources = (
        Sources([], {}) if all(file.exists() for file in made) else find_sources(most_bytes, development=development)
    )
    questions = make_questions(files, sources, counts)
    if not tokens_file.exists():
        learn_tokens(sources.pretraining).save(str(tokens_file))
    tokenizer = Tokenizer.from_file(str(tokens_file))
    if not weights_file.exists():
        text = encode_files(tokenizer, sources.pretraining)
        print(f"{len(text) / 1e6:.0f}M tokens of {len(sources.pretraining)} files", file=sys.stderr, flush=True)
        learner = fresh(0, device, **size)  # its layers are compiled
        about = pretrain(
            learner,
            text,
            steps=pretraining,
            seconds=seconds,
            batch=windows,
            rate=2e-3,
            seed=0,
            compiled=device != "cpu",
        )
        about |= {
            "asked": pretraining,
            "text_tokens": len(text),
            "parameters": sum(p.numel() for p in learner.parameters()),
        }
        write_safetensors(weights_file, learner.state_dict(), about)
    weights, about = read_safetensors(weights_file)
    if (asked := about.get("asked", pretraining)) != pretraining:
        sys.exit(f"{weights_file} was to learn for {asked} steps, not {pretraining}: remove it, or give another --out")
    model = fresh(0, device, **size)
    model.load_state_dict(weights)
    data = {part: batches(tokenizer, some, 4 * batch) for part, some in questions.items()}
    data["fit"], learnt = data.pop("train"), batches(tokenizer, questions["train"], batch)
    return Task(
        data,
        member=lambda seed: fine_tune(Chooser(model, seed), learnt, epochs, rate, seed),
        adapted=lambda _, seed: fine_tune(with_adapters(model, seed), learnt, epochs, 4 * rate, seed),
        logits_of=logits_of,
        about=about,
    )
