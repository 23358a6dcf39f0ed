"""Tiny models of every supported family, and the sharing models written out in plain torch."""

import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from effcore import share_activations
from effcore.reference import attention as ref

VOCAB, LAYERS, WINDOW = 97, 5, 6
_COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-mha-bias": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW, "num_key_value_heads": 1}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}
# mode, owner, layout: one region at the top, several groups, everything on layer 0
SHARINGS = {
    "qk": ("qk", "layer", "0_1_2_2_2"),
    "qk-blocks": ("qk", "layer", "0_0_2_2_2"),
    "kv": ("kv", "layer", "0_1_2_2_2"),
    "kv-blocks": ("kv", "layer", "0_0_2_2_2"),
    "kv-projection": ("kv", "projection", "0_1_2_2_2"),
}


def hf_model(family="llama", dtype=torch.float32, **options):
    """A transformers model whose weights are large enough that attention, positions and norms all matter."""
    model_class, config_class, extra = FAMILIES[family]
    model = model_class(config_class(**{**_COMMON, **extra, **options})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model.to(dtype)


def shared_model(sharing="qk", family="llama", dtype=torch.float32, **options):
    mode, owner, layout = SHARINGS[sharing]
    return share_activations(hf_model(family, dtype, **options), mode=mode, owner=owner, layout=layout)


def tokens(batch=2, length=13, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _norm(x, weight, eps):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rope(x, positions, theta):
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(half).float() / half)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def oracle_logits(model, ids, first_key=None, positions=None):
    """Logits of a sharing model: one readable loop over plain torch functions, on the model's own parameters."""
    c, p = model.config, dict(model.named_parameters())
    layout, theta, eps = model.layout, c.rope_parameters["rope_theta"], c.rms_norm_eps
    batch, length = ids.shape
    if positions is None:
        positions = torch.arange(length).expand(batch, length)

    def linear(x, name):
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def project(x, name, norm=None, rotate=False):
        y = linear(x, name).view(batch, length, -1, c.head_dim).transpose(1, 2)
        if norm is not None and norm in p:
            y = _norm(y, p[norm], eps)
        return _rope(y, positions, theta) if rotate else y

    hidden = p["model.embed_tokens.weight"][ids]
    scores, kv = {}, {}
    for i, owner in enumerate(layout.owners):
        at = f"model.layers.{i}."
        first = first_key
        if c.window(i) is not None:
            window = (torch.arange(length) - c.window(i) + 1).clamp(min=0).expand(batch, length)
            first = window if first is None else torch.maximum(window, first.reshape(batch, -1))
        x = _norm(hidden, p[at + "input_layernorm.weight"], eps)
        if owner == i or c.share_mode == "kv":
            q = project(x, at + "self_attn.q_proj", at + "self_attn.q_norm.weight", rotate=True)
        if owner == i:
            k = project(x, at + "self_attn.k_proj", at + "self_attn.k_norm.weight", rotate=True)
        if owner == i or c.share_mode == "qk":
            v = project(x, at + "self_attn.v_proj")
        if c.share_mode == "qk":
            if owner == i:
                scores[i] = ref.probabilities(q, k, causal=True, first_key=first)[0]
            out = ref.attention_from_scores(ref.SharedScores(scores[owner]), v)
        else:
            if owner == i:
                kv[i] = k, v
            out = ref.attention(q, *kv[owner], causal=True, first_key=first)
        hidden = hidden + linear(out.transpose(1, 2).reshape(batch, length, -1), at + "self_attn.o_proj")
        x = _norm(hidden, p[at + "post_attention_layernorm.weight"], eps)
        gate = F.silu(linear(x, at + "mlp.gate_proj")) * linear(x, at + "mlp.up_proj")
        hidden = hidden + linear(gate, at + "mlp.down_proj")
        if c.share_owner == "projection" and layout.consumers_of(i):
            extra = f"model.kv_projections.{i}."
            x = _norm(hidden, p[extra + "norm.weight"], eps)
            kv[i] = (
                project(x, extra + "k_proj", extra + "k_norm.weight", rotate=True),
                project(x, extra + "v_proj"),
            )
    hidden = _norm(hidden, p["model.norm.weight"], eps)
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])
    return hidden @ head.T


def loss_of(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model, loss):
    """Name -> gradient (None where there is none) after a backward pass of ``loss``."""
    model.zero_grad()
    loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] is None) == (want[name] is None), name
        if want[name] is not None:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
