"""Models and data of the Laplace tests."""

import torch
from torch import nn


def toy(dtype=torch.float64, inputs=3, hidden=5, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes, bias=False)).to(dtype)


def data(count=24, inputs=3, classes=4, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.randn(count, inputs, dtype=dtype), torch.randint(0, classes, (count,))


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def moe(kind, dtype=torch.float32, seed=0):
    import transformers as hf

    torch.manual_seed(seed)
    common = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "qwen2":
        config = hf.Qwen2MoeConfig(
            **common, num_experts=5, moe_intermediate_size=12, intermediate_size=24, shared_expert_intermediate_size=12
        )
        model = hf.Qwen2MoeForCausalLM(config)
    elif kind == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**common, num_local_experts=4, intermediate_size=12))
    else:
        config = hf.DeepseekV3Config(
            **common, n_routed_experts=4, moe_intermediate_size=12, intermediate_size=24, n_shared_experts=1, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8,
        )  # fmt: skip
        model = hf.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.3)
    model.set_experts_implementation("eager")  # the one that takes float64
    return model.to(dtype).eval()


def text(rows=4, length=9, padded=True, seed=3):
    torch.manual_seed(seed)
    ids, mask = torch.randint(0, 40, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    if padded:
        for row, n in enumerate(torch.randint(4, length + 1, (rows,)).tolist()):
            mask[row, n:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (rows,))}


ANSWERS = [3, 7, 11]
