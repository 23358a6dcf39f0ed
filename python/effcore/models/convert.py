"""One line that makes a loaded Hugging Face model share attention activations."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import nn

from effcore.models.config import MODES, OWNERS, SharedLlamaConfig
from effcore.models.decoder import SharedLlamaModel
from effcore.models.layer import PIECES, SharedAttention, SharedDecoderLayer
from effcore.models.layout import Layout
from effcore.models.llama import SharedLlamaForCausalLM

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def share_activations(
    model: nn.Module,
    mode: str = "qk",
    start: int | None = None,
    layout: Layout | str | None = None,
    shared: int | None = None,
    owner: str = "layer",
    inplace: bool = True,
) -> SharedLlamaForCausalLM:
    """Makes the layers of a LLaMA-family model share attention activations (EPAS, arXiv 2601.19089; ECHO-LLaMA, 2505.17331).

    In place: ``model`` itself becomes a :class:`SharedLlamaForCausalLM`. Its parameters stay the same objects, so tied
    embeddings, optimizers and references to it stay valid. Where nothing is shared it computes what it computed before.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model of transformers, or one that was converted before
            (then the mode and layout change).
        mode: ``"qk"``: layers of a group use one softmax(QKᵀ), each with its own V. ``"kv"``: they use one K and V, each with
            its own Q.
        start: layers ``start`` and above use the activations of layer ``start - 1``.
        shared: the same, counted from the end: the last ``shared`` layers; 0 shares nothing yet.
        layout: one owner index per layer, a :class:`Layout` or its string ``"0_1_2_2_2_2"``. Exactly one of these three.
        owner: mode ``"kv"``: ``"layer"`` shares K,V of layer ``start - 1``; ``"projection"`` adds one norm and K,V projection
            of its output (YOCO), which begins as a copy of the first consumer's.
        inplace: False converts a copy.

    Returns:
        The model.

    Raises:
        TypeError: another kind of model, or one wrapped by PEFT, FSDP or torch.compile: convert first, wrap then.
        ValueError: a layout that does not fit, or an option of the model that is not supported; named.
    """
    if mode not in MODES:
        raise ValueError(f"effcore.share_activations: mode must be 'qk' or 'kv', got {mode!r}")
    if owner not in OWNERS:
        raise ValueError(f"effcore.share_activations: owner must be 'layer' or 'projection', got {owner!r}")
    if owner == "projection" and mode != "kv":
        raise ValueError("effcore.share_activations: owner='projection' needs mode='kv': it projects keys and values")
    already = isinstance(model, SharedLlamaForCausalLM)
    if not already:
        _check_convertible(model)
    assert isinstance(model, transformers.PreTrainedModel)
    wanted = _layout(model.config.num_hidden_layers, start, layout, shared)
    if already:
        if model.config.dropped_projections and (mode, owner) != (model.config.share_mode, model.config.share_owner):
            raise ValueError("effcore.share_activations: projections were dropped, so the mode cannot change any more")
        config: Any = model.config
    else:
        config = SharedLlamaConfig.from_hf(model.config, share_mode=mode, share_owner=owner)
    # On a copy of the configuration, so that what is refused leaves the model as it was.
    trial = copy.deepcopy(config)
    trial.share_mode, trial.share_owner = mode, owner
    trial.check_layout(wanted)
    if not inplace:
        model = copy.deepcopy(model)
    if already:
        config = model.config
        config.share_mode, config.share_owner = mode, owner
    else:
        _become_shared(model, config)
    converted: Any = model
    if owner == "projection":
        converted.add_kv_projections(wanted)
    elif converted.model.kv_projections:
        converted.model.kv_projections = nn.ModuleDict()
    converted.set_layout(wanted)
    return converted


def _layout(layers: int, start: int | None, layout: Layout | str | None, shared: int | None) -> Layout:
    given = [name for name, value in (("start", start), ("layout", layout), ("shared", shared)) if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"effcore.share_activations: give one of start, layout and shared, got {' and '.join(given) or 'none'} "
            "(shared=0 shares nothing yet)"
        )
    if start is not None:
        return Layout.from_start(layers, start)
    if shared is not None:
        return Layout.from_shared(layers, shared)
    assert layout is not None
    return Layout.coerce(layout, layers)


def _check_convertible(model: Any) -> None:
    kind = type(model)
    if kind not in {getattr(transformers, name) for name in SUPPORTED}:
        wrapped = next(
            (w for w in ("Peft", "FSDP", "OptimizedModule", "DistributedDataParallel") if w in kind.__name__), None
        )
        hint = "; convert the model first and wrap it then" if wrapped else ""
        raise TypeError(f"effcore.share_activations: supports {', '.join(SUPPORTED)}; got {kind.__name__}{hint}")
    for name, module in model.named_modules():
        if "forward" in vars(module) and (name in ("", "model") or _is_layer(name) or name.endswith("self_attn")):
            raise TypeError(
                f"effcore.share_activations: the forward of {name or 'the model'!r} was replaced (device_map hooks or a "
                "patch), and converting would undo that; load the model without it"
            )


def _is_layer(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[1] == "layers"


def _become_shared(model: Any, config: SharedLlamaConfig) -> None:
    """Changes the classes of the model, its decoder, its layers and their attention; modules and parameters stay."""
    config.architectures = [SharedLlamaForCausalLM.__name__]
    decoder = model.model
    for i, layer in enumerate(decoder.layers):
        layer.self_attn.__class__ = SharedAttention
        layer.self_attn.configure(config, i)
        layer.__class__ = SharedDecoderLayer
        layer.pieces = PIECES
    decoder.__class__, model.__class__ = SharedLlamaModel, SharedLlamaForCausalLM
    decoder.kv_projections = nn.ModuleDict()
    for module in (decoder, model):
        module.config = config
        module._no_split_modules = {SharedDecoderLayer.__name__}
