"""The models of the packages task of Bayesian-MoE's claim: a small Qwen2-MoE that learns it from scratch."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims._bayesian_packages import ANSWERS, ASK, LENGTH, PAD, make_data
from benchmarks.claims._bayesian_task import Batch, Task


def _all_experts(module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert on every token, most of them with weight 0: at this size faster than finding out which are needed, since
    nobody waits for the device."""
    weights = x.new_zeros(len(x), module.num_experts).scatter(1, top_k_index, top_k_weights.to(x.dtype))
    out = module._apply_gate(x @ module.gate_up_proj.mT) @ module.down_proj.mT  # [E, T, O]
    return torch.einsum("eto,te->to", out, weights)


def fresh(seed: int, device: str) -> Any:
    import transformers as hf
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("all_experts", _all_experts)
    torch.manual_seed(seed)
    config = hf.Qwen2MoeConfig(
        vocab_size=ASK + 1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=64, intermediate_size=128, shared_expert_intermediate_size=32,
        max_position_embeddings=LENGTH + 8, attention_dropout=0.1, pad_token_id=PAD, tie_word_embeddings=False,
        experts_implementation="all_experts",
    )  # fmt: skip
    return hf.Qwen2MoeForCausalLM(config).to(device)


def logits_of(model: Any, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    # No mask: pieces have one length. It would be compared on the host in each layer.
    out = model(input_ids=batch["input_ids"].to(device), logits_to_keep=1, use_cache=False)
    return out.logits[:, -1, ANSWERS].float()


def train(model: Any, data: list[Batch], epochs: int, rate: float, seed: int) -> Any:
    """AdamW and one cycle of the learning rate, for so many epochs."""
    device = next(model.parameters()).device
    data = [{name: t.to(device) for name, t in batch.items()} for batch in data]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(data))
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in rng.sample(data, len(data)):
            loss = torch.nn.functional.cross_entropy(logits_of(model, batch), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def with_adapters(model: Any, data: list[Batch], epochs: int, seed: int) -> Any:
    """A copy with LoRA adapters on attention, trained on from the same weights."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return train(peft.get_peft_model(copy.deepcopy(model), config), data, epochs, 1e-3, seed)


def packages_task(*, train_on: int, test: int, batch: int, epochs: int, rate: float, device: str) -> Task:
    data = make_data(train_on, test, batch)
    learnt = data.pop("train")
    return Task(
        data,
        member=lambda seed: train(fresh(seed, device), learnt, epochs, rate, seed),
        adapted=lambda model, seed: with_adapters(model, learnt, max(1, epochs // 3), seed),
        logits_of=logits_of,
        answers=ANSWERS,
    )
