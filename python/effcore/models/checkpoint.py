"""Loading checkpoints: this model's own, those of transformers' LLaMA family, GGUF files, fused projections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from effcore.models.config import SharedLlamaConfig

_FUSED = ("self_attn.qkv_proj.", "mlp.gate_up_proj.")


def load_pretrained(cls: Any, base: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """The body of ``SharedLlamaForCausalLM.from_pretrained``; ``base`` is transformers' own."""
    if kwargs.get("gguf_file") is not None:
        from effcore.models.convert import share_activations

        return share_activations(AutoModelForCausalLM.from_pretrained(path, *args, **kwargs), shared=0)
    config = kwargs.pop("config", None)
    if path is None:  # a state dict beside a configuration
        return base(path, *args, config=config, **kwargs)
    if config is None or not hasattr(config, "model_type"):
        lookup = {
            k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only", "subfolder") if k in kwargs
        }
        config = AutoConfig.from_pretrained(path if config is None else config, **lookup)
    if not isinstance(config, SharedLlamaConfig):
        config = SharedLlamaConfig.from_hf(config)
    if (
        kwargs.get("state_dict") is None
        and Path(path).is_dir()
        and any(_is_fused(name) for name in _tensor_names(Path(path)))
    ):
        made = base(None, *args, config=config, state_dict=split_fused(_read(Path(path)), config), **kwargs)
        belongs_to(made[0] if isinstance(made, tuple) else made, Path(path))
        return made
    return base(path, *args, config=config, **kwargs)


def belongs_to(model: Any, folder: Path) -> None:
    """What transformers reads beside the weights: how to generate (which tokens end a text), and where the model is from."""
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def split_fused(state: dict[str, Tensor], config: SharedLlamaConfig) -> dict[str, Tensor]:
    """Splits ``self_attn.qkv_proj`` into q, k and v and ``mlp.gate_up_proj`` into gate and up (weights and biases).

    Raises:
        ValueError: a fused tensor whose rows do not add up to the configuration's heads.
    """
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    kv = (config.num_key_value_heads or config.num_attention_heads) * head_dim
    parts = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), (config.num_attention_heads * head_dim, kv, kv)),
        "gate_up_proj": (("gate_proj", "up_proj"), (config.intermediate_size, config.intermediate_size)),
    }
    result = {}
    for name, tensor in state.items():
        if not _is_fused(name):
            result[name] = tensor
            continue
        fused = "qkv_proj" if "qkv_proj" in name else "gate_up_proj"
        names, sizes = parts[fused]
        if tensor.shape[0] != sum(sizes):
            raise ValueError(f"effcore: {name} must have {' + '.join(map(str, sizes))} rows, got {tensor.shape[0]}")
        for part, piece in zip(names, tensor.split(sizes), strict=True):
            result[name.replace(fused, part)] = piece.contiguous()
    return result


def _is_fused(name: str) -> bool:
    return any(part in name for part in _FUSED)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _tensor_names(folder: Path) -> list[str]:
    names: list[str] = []
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def _read(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            state.update((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (not a dict)
    return state
