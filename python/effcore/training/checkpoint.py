"""Training state in safetensors files, without pickle, and the checkpoint folders of a run."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed

from effcore.errors import InputError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
COMPLETE = "trainer_state.json"  # the Trainer writes it last


def save_tree(path: Path, tree: Any) -> None:
    """Writes nested dicts, lists and tuples of tensors, NumPy arrays, numbers, strings and None as one safetensors file.

    The tensors are the file's tensors; the structure is JSON in its metadata.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_pack(tree, tensors))
    save_file(tensors, path, metadata={"effcore": structure})


def load_tree(path: Path) -> Any:
    """What :func:`save_tree` wrote.

    Raises:
        InputError: the file is damaged or was written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["effcore"])
            return _unpack(structure, file.get_tensor)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: damaged, or not written by effcore ({error})") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        name = str(len(tensors))
        if isinstance(value, np.ndarray):
            whole = value.dtype.kind in "biu"  # torch lacks most unsigned types
            tensors[name] = torch.from_numpy(value.astype(np.int64 if whole else value.dtype))
            return {"kind": "array", "name": name, "dtype": str(value.dtype)}
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"kind": "tensor", "name": name}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"kind": "tuple", "items": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot save a {type(value).__name__} in a checkpoint")


def _unpack(value: Any, tensor: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    match value["kind"]:
        case "tensor":
            return tensor(value["name"])
        case "array":
            return tensor(value["name"]).numpy().astype(value["dtype"])
        case "tuple":
            return tuple(_unpack(item, tensor) for item in value["items"])
        case _:
            return {_unpack(key, tensor): _unpack(item, tensor) for key, item in value["items"]}


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch (all devices) of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


# Without `strict`: the projections of layers that share never got a gradient, so the optimizer holds nothing of them, and of
# tied weights only one is in the file.
_WHOLE = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def gathered_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The whole state of a sharded (FSDP2) model's optimizer, by the parameters' names; to be called by all processes.

    Only the first process gets it, the others get an empty dict.
    """
    return distributed.get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def scatter_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Gives every process its shards of what :func:`gathered_optimizer` returned, however many processes there were then."""
    distributed.set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)


def scatter_model(model: nn.Module, folder: Path) -> None:
    """Gives every process its shards of the weights that ``save_pretrained`` wrote into ``folder``."""
    weights: dict[str, Any] = {}
    for file in folder.glob("model*.safetensors"):
        weights |= load_file(file)
    distributed.set_model_state_dict(model, weights, options=_WHOLE)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _CHECKPOINT.search(path.name))]
    return [path for _, path in sorted(found) if (path / COMPLETE).is_file()]


def keep_latest(run: Path, count: int) -> None:
    """Deletes all but the newest ``count`` checkpoints."""
    for path in checkpoints(run)[:-count]:
        shutil.rmtree(path, ignore_errors=True)
