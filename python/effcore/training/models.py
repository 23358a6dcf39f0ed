"""Model and tokenizer of a run: a fresh LLaMA by the recipe, or a checkpoint (Hugging Face folder, run folder, GGUF file)."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

import effcore.models
from effcore.data import byte_tokenizer
from effcore.errors import InputError, input_error
from effcore.methods.low_rank_checkpoint import DESCRIPTION, load_decomposed
from effcore.methods.vds_run import is_run
from effcore.models import (
    FlowHNConfig,
    FlowHNForCausalLM,
    Layout,
    SharedLlamaConfig,
    SharedLlamaForCausalLM,
    cache_bytes_per_token,
)
from effcore.training.checkpoint import checkpoints
from effcore.training.recipe import ModelSettings, Recipe

ADAPTER = "adapter_config.json"  # what PEFT calls it


def fresh_model(settings: ModelSettings, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A LLaMA with random weights: the same ones for the same seed, whatever method trains it."""
    set_seed(seed)
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=settings.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return LlamaForCausalLM(config)


def fresh_flowhn(recipe: Recipe, tokenizer: Any) -> FlowHNForCausalLM:
    """A FlowHN model with random weights. A block holds two layers, so it has half as many blocks as the LLaMA has layers.

    Raises:
        InputError: settings that do not fit each other.
    """
    settings, flow = recipe.model, recipe.flowhn
    set_seed(recipe.training.seed)
    try:
        config = FlowHNConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.mlp_size,
            num_hidden_layers=max(settings.layers // 2, 1),
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            tie_word_embeddings=settings.tie_embeddings,
            strategy=flow.strategy,
            routing_length=recipe.data.length if flow.routing_length is None else flow.routing_length,
            attention_tokens=flow.attention_tokens,
            state_size=flow.state_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except Exception as error:  # huggingface_hub wraps what validation raises
        raise input_error(error.__cause__ if isinstance(error.__cause__, ValueError) else error, "flowhn") from error
    return FlowHNForCausalLM(config)


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, inference: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint: a folder of ``save_pretrained``, a run folder of ``effcore train``, or a GGUF file.

    Args:
        inference: whether the model will only run: what ``effcore compress`` wrote and adapters (PEFT) will do then too.

    Raises:
        InputError: there is nothing at ``path``, it is damaged, lacks weights, or is not a causal language model.
    """
    folder, options = _resolve(Path(path))
    if not inference and (folder / ADAPTER).is_file():
        raise InputError(f"{path}: an adapter, which can generate; merge it into its model first")
    if inference and (folder / DESCRIPTION).is_file():
        with quiet_transformers():
            model, tokenizer = load_decomposed(folder), load_tokenizer(path)
        return model if dtype is None else model.to(dtype), tokenizer
    if dtype is not None:
        options["dtype"] = dtype
    try:
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # reading GGUF shows a bar of its own
            tokenizer = AutoTokenizer.from_pretrained(folder, **{k: v for k, v in options.items() if k != "dtype"})
            model = whole_model(folder, **options)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # transformers, safetensors and gguf raise a dozen kinds for a bad file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path}: cannot be loaded as a language model ({type(error).__name__}: {reason})") from error
    if "gguf_file" in options:  # its weights are ordinary tensors now, though transformers calls the model quantized
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def whole_model(folder: Path, **options: Any) -> Any:
    """A causal language model of transformers, all of whose weights lie in the folder; others would be drawn at random.

    An adapter (PEFT) comes attached to the model that it was trained on: the one in its folder, or the one that it names.

    Raises:
        InputError: weights are missing, the model is a classifier, or decomposed, or the adapter names no model.
    """
    if not (folder / ADAPTER).is_file():
        return _whole_base(folder, options)
    base = folder
    if not (folder / "config.json").is_file():
        named = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not named:
            raise InputError(f"{folder}: an adapter that names no base model")
        base = Path(named)
    model = _whole_base(base, options)
    found = model.load_adapter(str(folder), dtype=model.dtype)
    if missing := sorted(found.missing_keys):
        raise InputError(f"{folder}: not a whole adapter: it has no {', '.join(missing[:3])}")
    return model


def _whole_base(folder: Path, options: dict[str, Any]) -> Any:
    if (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder}: a decomposed model, which can generate; give the one that it was made of")
    # With an adapter transformers would tell what the adapter lacks and not the model: it finds none in that subfolder.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, adapter_kwargs={"subfolder": "without"}, **options
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{folder}: not a language model: it has no {', '.join(missing[:3])}")
    if any("Classification" in kind for kind in getattr(model.config, "architectures", None) or ()):
        raise InputError(f"{folder}: not a language model, but a {model.config.architectures[0]}")
    return model


def load_tokenizer(path: str | Path | None) -> Any:
    """The tokenizer of a checkpoint, or bytes where there is none."""
    if path is None:
        return byte_tokenizer()
    folder, options = _resolve(Path(path))
    try:
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise InputError(
            f"{path}: cannot be loaded as a language model: no usable tokenizer ({' '.join(str(error).split())[:300]})"
        ) from error


def _resolve(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that transformers reads, and its options for what lies there."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path}: a model is a folder with config.json and safetensors, or a .gguf file")
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir():
        raise InputError(f"{path}: no such model (expected a folder, a run folder of effcore train, or a .gguf file)")
    if (path / "model" / "config.json").is_file() and (is_run(path) or not (path / "config.json").is_file()):
        return path / "model", {}
    if is_run(path):
        raise InputError(f"{path}: no model here, but what effcore adapt keeps; with --merge it also saves the model")
    if (path / "config.json").is_file() or (path / ADAPTER).is_file():
        return path, {}
    if inside := checkpoints(path):
        return inside[-1], {}
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return path, {"gguf_file": ggufs[0].name}
    raise InputError(f"{path}: no model here (no config.json, no checkpoint of a run, and {len(ggufs)} .gguf files)")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and advice on the terminal; errors still arrive as exceptions."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def parse_layout(text: str, layers: int) -> Layout:
    """A layout that the user wrote.

    Raises:
        InputError: it points forward, names an owner that does not own, or has another number of layers.
    """
    try:
        return Layout.parse(text, layers)
    except ValueError as error:
        raise input_error(error, f"layout {text}") from error


def make_sharing(model: Any, mode: str) -> SharedLlamaForCausalLM:
    """The model as one whose layers can share, in the layout that it has (full unless it shared before).

    Raises:
        InputError: an architecture that cannot.
    """
    layout = model.layout if isinstance(model, SharedLlamaForCausalLM) else Layout.full(model.config.num_hidden_layers)
    try:
        return effcore.models.share_activations(model, mode=mode, layout=layout)
    except (TypeError, ValueError) as error:
        raise input_error(error) from error


def describe(model: Any, cache_dtype: torch.dtype) -> dict[str, Any]:
    """Mode, layout, number of shared layers, and bytes that a token takes in the model's KV cache at ``cache_dtype``."""
    config = model.config
    if isinstance(
        config, FlowHNConfig
    ):  # keys and values of the tokens that attention takes, on average over positions
        kept = config.split / config.routing_length if config.strategy in ("ae", "fa", "fac") else 1.0
        width = config.num_key_value_heads * config.head_dim * 2 * cache_dtype.itemsize
        return {
            "mode": config.strategy,
            "layout": f"attention {config.split} of {config.routing_length} tokens",
            "shared_layers": 0,
            "cache_bytes_per_token": round(config.num_hidden_layers * width * kept),
        }
    shared = isinstance(config, SharedLlamaConfig)
    plain = config if shared else SharedLlamaConfig.from_hf(config)
    layout = model.layout if hasattr(model, "layout") else plain.layout
    return {
        "mode": config.share_mode if shared and layout.shared else None,
        "layout": str(layout),
        "shared_layers": layout.shared,
        "cache_bytes_per_token": cache_bytes_per_token(plain, layout, dtype=cache_dtype),
    }


def check_length(model: Any, length: int) -> None:
    """Raises InputError where windows are longer than the model's positions, if it has any."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"data.length is {length}, but the model has positions for {limit} tokens")
