"""Decomposed models on disk: safetensors, a description of the new layers, and nothing of the dense model.

folder/model.safetensors        all weights (tied ones once)
folder/low_rank.json            name -> kind and constructor arguments of each layer that is not the architecture's
folder/config.json              Hugging Face models: their configuration, which says the architecture
folder/generation_config.json   those that generate: their end tokens and defaults
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effcore.errors import InputError
from effcore.files import write_atomically
from effcore.methods.low_rank_fading import Fading
from effcore.methods.low_rank_layers import replace
from effcore.nn.low_rank import LowRankConv2d, LowRankLinear
from effcore.nn.side_by_side import NarrowConv2d

DESCRIPTION = "low_rank.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
_KINDS: dict[str, Callable[..., nn.Module]] = {
    "low_rank_linear": LowRankLinear,
    "low_rank_conv2d": LowRankConv2d,
    "conv2d": nn.Conv2d,
    "batch_norm2d": nn.BatchNorm2d,
}


def _describe(module: nn.Module) -> dict[str, Any] | None:
    if isinstance(module, LowRankLinear):
        return {"kind": "low_rank_linear"} | module.spec()
    if isinstance(module, LowRankConv2d):
        return {"kind": "low_rank_conv2d"} | module.spec()
    if type(module) in (nn.Conv2d, NarrowConv2d):  # merged ones have other sizes than the architecture's
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        return {"kind": "conv2d", "bias": module.bias is not None} | {n: getattr(module, n) for n in names}
    if type(module) is nn.BatchNorm2d:
        own = ("num_features", "eps", "momentum", "affine", "track_running_stats")
        return {"kind": "batch_norm2d"} | {n: getattr(module, n) for n in own}
    return None


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind and constructor arguments of the layers that decomposing, merging or branching may have made."""
    inside = {
        f"{n}.{part}"
        for n, m in model.named_modules()
        if isinstance(m, LowRankConv2d)
        for part in ("first", "core", "last")
    }
    described = {n: _describe(m) for n, m in model.named_modules() if n not in inside}
    return {n: d for n, d in described.items() if d is not None}


def save_decomposed(model: nn.Module, folder: str | Path) -> None:
    """Writes a decomposed model; :func:`load_decomposed` reads it without the dense one.

    Raises:
        ValueError: what was cut off still fades beside a layer's factors (:mod:`effcore.methods.low_rank_fading`).
    """
    from safetensors.torch import save_model

    for name, module in model.named_modules():
        if isinstance(module, Fading):
            raise ValueError(
                f"effcore.save_decomposed: what layer {name} lost still fades; low_rank_fading.settle(model) drops it"
            )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS))
    write_atomically(folder / DESCRIPTION, json.dumps({"version": 1, "layers": describe(model)}, indent=1))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        if not getattr(config, "architectures", None):
            config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:  # not by save_pretrained, which refuses what some published models have
        write_atomically(folder / GENERATION, generation.to_json_string())


def load_decomposed(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A model that :func:`save_decomposed` wrote, in evaluation mode.

    Args:
        model: an instance of the architecture, freshly made (its weights do not matter). Hugging Face models need none: the
            configuration names the class.

    Raises:
        InputError: a file is missing or damaged, or the layers do not fit the architecture.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    try:
        layers = dict(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / DESCRIPTION}: not a decomposed model ({type(error).__name__})") from error
    if model is None:
        model = _architecture(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder / WEIGHTS}: no such file")
    reference = next(model.parameters())
    for name, spec in layers.items():
        try:
            arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "kind"}
            model.get_submodule(name)
            new = _KINDS[spec["kind"]](**arguments)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / DESCRIPTION}: layer {name} does not fit the architecture: {error}") from error
        replace(model, name, new.to(device=reference.device, dtype=reference.dtype))
    try:
        missing, unexpected = load_model(model, str(folder / WEIGHTS), strict=False)
    except Exception as error:  # safetensors raises several kinds for a damaged file
        raise InputError(f"{folder / WEIGHTS}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    if missing or unexpected:
        raise InputError(f"{folder / WEIGHTS}: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}")
    return model.eval()


def _architecture(folder: Path) -> nn.Module:
    import transformers

    import effcore.models  # which tells transformers its own configurations
    from effcore.models.checkpoint import belongs_to

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        name = config.architectures[0]
        cls = getattr(effcore.models, name, None) or getattr(transformers, name)
    except Exception as error:
        raise InputError(f"{folder}: no configuration of a transformers model; pass model=") from error
    # As from_pretrained makes it: model.to(dtype) would also round the frequencies of rotary embeddings, which stay float32.
    model = cls._from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    belongs_to(model, folder)
    return model
