"""One step against several, and against one step whose cut-off part fades: perplexity after equally many tokens of recovery.

A byte-level LLaMA is trained on PyTorch's own sources (less than once over them), its MLPs become ``ratio`` times smaller, and
the model recovers. Each way has, at each length of the recovery, a learning rate and other settings of its own, found on a seed
that is not reported; each has as many trials.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effcore.methods.low_rank_callbacks import ProgressiveDecomposition

LENGTH = 256  # bytes of a window
EAGER = 3  # steps before a CUDA graph is captured
ONE, STAGES, FADING = "one step", "stages", "fading"


@dataclass(frozen=True)
class Way:
    """How a model is made smaller and how it recovers."""

    kind: str
    lr: float = 1e-3
    warm: int = 20  # steps over which the rate rises, again after each change of parameters
    end: float = 0.1  # of the rate, where its cosine ends
    weighted: bool = False  # singular values, by the activations' second moments
    early: float = 0.2  # the part of the recovery before the final rank stands alone
    stages: int = 4


@dataclass(frozen=True)
class Setup:
    width: int
    layers: int
    steps: int
    batch: int
    ratio: float
    device: str
    folder: str = ""  # of the dense models


@cache
def _text(device: str) -> tuple[Tensor, Tensor]:
    """Windows to train on and windows held out, of other files."""
    from effcore.data import byte_tokenizer
    from effcore.data.corpus import load_corpus

    corpus = load_corpus(Path(torch.__file__).parent, byte_tokenizer())

    def windows(tokens: np.ndarray) -> Tensor:
        count = len(tokens) // LENGTH
        return torch.from_numpy(np.asarray(tokens[: count * LENGTH], dtype=np.int64)).view(count, LENGTH)

    held = windows(corpus.validation)
    return windows(corpus.train).to(device), held[:: max(1, len(held) // 512)][:512].to(device)


def _fresh(setup: Setup) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    from effcore.data import byte_tokenizer

    torch.set_float32_matmul_precision("high")
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=setup.width,
        intermediate_size=3 * setup.width,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.width // 32,
    )
    return LlamaForCausalLM(config).to(setup.device)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch: int = 32) -> float:
    was, losses = model.training, []
    model.eval()
    for part in windows.split(batch):
        losses.append(float(model(input_ids=part, labels=part).loss) * len(part))
    model.train(was)
    return math.exp(sum(losses) / len(windows))


def train(
    model: nn.Module,
    windows: Tensor,
    steps: int,
    batch: int,
    way: Way,
    schedule: ProgressiveDecomposition | None = None,
    *,
    half: bool = False,
    each: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """AdamW under a cosine; ``schedule.apply`` runs ahead of each step. After a stage the rate rises anew: new parameters have
    no moments yet. On a GPU a CUDA graph repeats the steps between two changes of the model. Returns the losses [steps]."""
    cuda = windows.is_cuda
    rate = torch.tensor(way.lr, device=windows.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, capturable=cuda)
    draw = torch.Generator().manual_seed(0)
    order = torch.randint(len(windows), (steps, batch), generator=draw).to(windows.device)
    part, last = windows[:batch].clone(), torch.zeros((), device=windows.device)
    losses = torch.zeros(steps, device=windows.device)
    graph: torch.cuda.CUDAGraph | None = None
    eager, changed = EAGER, 0

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(windows.device.type, torch.bfloat16) if half else nullcontext():
            loss = model(input_ids=part, labels=part).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last.copy_(loss.detach())

    model.train()
    side = torch.cuda.Stream() if cuda else None
    for step in range(steps):
        if schedule is not None:
            before = schedule.stage, schedule.fading
            schedule.apply(model, step, 0.0, optimizer)
            if before != (schedule.stage, schedule.fading):
                graph, eager = None, EAGER
                changed = changed if schedule.stage == before[0] else step
        each(step)
        rise = min(1.0, (step - changed + 1) / way.warm)
        rate.fill_(way.lr * rise * (way.end + (1 - way.end) * 0.5 * (1 + math.cos(math.pi * step / steps))))
        part.copy_(windows[order[step]])
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
                optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    one()
            graph.replay()
        losses[step] = last
    return losses.cpu()


def _file(setup: Setup, seed: int) -> Path:
    return Path(setup.folder) / f"{setup.layers}x{setup.width}_{setup.steps}x{setup.batch}_{seed}.pt"


def pretrain(setup: Setup, seed: int) -> dict[str, Any]:
    """The dense model of a seed, trained unless the folder has it."""
    windows, held = _text(setup.device)
    torch.manual_seed(seed)
    model, at, file = _fresh(setup), perf_counter(), _file(setup, seed)
    if file.exists():
        model = _dense(setup, seed)
    else:
        train(model, windows, setup.steps, setup.batch, Way("dense", 1e-3), half=True)
        part = file.with_suffix(".part")  # a run that is stopped here leaves no half of a model
        torch.save(model.state_dict(), part)
        part.rename(file)
    return {
        "seed": seed,
        "way": {"kind": "dense"},
        "perplexity": perplexity(model, held),
        "windows": len(windows),
        "seconds": round(perf_counter() - at, 1),
    }


@cache
def _dense(setup: Setup, seed: int) -> nn.Module:
    model = _fresh(setup)
    model.load_state_dict(torch.load(_file(setup, seed), map_location=setup.device))
    return model


def recover(setup: Setup, seed: int, way: Way, steps: int, points: int = 0) -> dict[str, Any]:
    """One row: the held-out perplexity at the end, and ``points`` on the way there and around each change."""
    at = perf_counter()
    windows, held = _text(setup.device)
    model = copy.deepcopy(_dense(setup, seed))
    options: dict[str, Any] = {"include": ["mlp"], "multiple": 1}
    if way.weighted:
        options |= {
            "measure": None,
            "data": [{"input_ids": w} for w in windows[:: len(windows) // 128][:128].split(32)],
        }
    over = max(1, round(steps * way.early))
    count = way.stages if way.kind == STAGES else 1
    every = over if way.kind == FADING else max(1, over // max(1, count - 1))
    ratios = (setup.ratio ** (1 / count),) * count
    schedule = ProgressiveDecomposition(ratios, every, options=options, fade=way.kind == FADING)
    curve: list[tuple[int, float]] = []

    def look(step: int) -> None:
        if points and (step % max(1, steps // points) == 0 or step == 5):
            curve.append((step, perplexity(model, held[::4])))

    losses = train(model, windows, steps, setup.batch, way, schedule, each=look)
    bins = losses.view(-1, max(1, steps // 20))[:20] if steps % 20 == 0 else losses[None]
    return {
        "seed": seed,
        "steps": steps,
        "way": asdict(way),
        "mlp_parameters": sum(p.numel() for n, p in model.named_parameters() if "mlp" in n),
        "perplexity": perplexity(model, held),
        "perplexity_dense": None,
        "curve": curve,
        "losses": [round(float(b), 4) for b in bins.mean(1)],
        "seconds": round(perf_counter() - at, 1),
    }


# What the search on six layers found, where its differences were more than a few thousandths.
FOUND = (Way(ONE, warm=60), Way(ONE), Way(FADING, warm=60), Way(FADING), Way(STAGES, early=0.1))


def _around(way: Way) -> list[Way]:
    """Trials around what is best so far, as many for one step as for each of the others."""
    trials = [replace(way, lr=way.lr * f) for f in (0.7, 1.4)] + [replace(way, warm=3 * way.warm)]
    if way.kind == ONE:
        return [*trials, replace(way, lr=way.lr * 1.4, warm=3 * way.warm)]
    return [*trials, replace(way, early=way.early / 2)]


def _together(way: Way, trials: dict[Way, float]) -> Way:
    """All single changes of this way that were better than it."""
    names = ("lr", "warm", "end", "weighted", "early", "stages")
    better = [w for w in trials if w.kind == way.kind and trials[w] < trials[way]]
    result = way
    for other in sorted(better, key=trials.__getitem__, reverse=True):  # of two rates the better one
        result = replace(result, **{n: getattr(other, n) for n in names if getattr(other, n) != getattr(way, n)})
    return result


def _share_cores(processes: int) -> None:
    """In each process: where all take all cores, those of a factorization wait for one another for minutes."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def progressive(
    setup: Setup,
    lengths: Sequence[int],
    seeds: Sequence[int],
    tuning: int,
    at_once: int,
    *,
    rates: Sequence[float],
    refine: bool,
    kinds: Sequence[str] = (ONE, FADING, STAGES),
    done: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Rows as they come; "trial" says which are those of the seed on which settings are found: each rate, and with
    ``refine`` what lies around the best one. What is among ``done`` is not run again, nor are dense models trained
    again that ``setup.folder`` has."""
    with tempfile.TemporaryDirectory() as folder:
        setup = replace(setup, folder=setup.folder or folder)
        _text("cpu")  # the corpus is cut once
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(at_once, context, _share_cores, (at_once,)) as pool:
            dense = {}
            for future in as_completed([pool.submit(pretrain, setup, s) for s in (tuning, *seeds)]):
                row = future.result()
                dense[row["seed"]] = row["perplexity"]
                print(row, flush=True)
                yield row

            def run(jobs: list[tuple[int, Way]], steps: int, trial: bool) -> Iterator[dict[str, Any]]:
                futures = [pool.submit(recover, setup, s, w, steps, 0 if trial else 12) for s, w in jobs]
                for future in as_completed(futures):
                    row = future.result() | {"trial": trial}
                    row["perplexity_dense"] = dense[row["seed"]]
                    print(row["seed"], steps, round(row["perplexity"], 4), row["seconds"], row["way"], flush=True)
                    yield row

            chosen = [w for w in FOUND if w.kind in kinds]
            for k, steps in enumerate(lengths):
                if k:
                    chosen = [replace(w, warm=max(2, round(w.warm * steps / lengths[k - 1]))) for w in chosen]
                known = [r for r in done if r.get("trial") and r["seed"] == tuning and r["steps"] == steps]
                fields = asdict(FOUND[0]).keys()  # rows of another version may have others
                trials = {
                    Way(**r["way"]): r["perplexity"]
                    for r in known
                    if r["way"]["kind"] in kinds and r["way"].keys() == fields
                }
                for stage in range(3 if refine else 1):
                    if stage == 0:
                        ways = [replace(w, lr=r) for r in rates for w in chosen]
                    elif stage == 1:
                        ways = [w for c in chosen for w in _around(c)]
                    else:
                        ways = [_together(c, trials) for c in chosen]
                    for row in run([(tuning, w) for w in dict.fromkeys(ways) if w not in trials], steps, True):
                        trials[Way(**row["way"])] = row["perplexity"]
                        yield row
                    if stage != 1:
                        chosen = [_best(kind, trials) for kind in kinds]
                made = [(r["seed"], r["way"]) for r in done if r.get("trial") is False and r["steps"] == steps]
                yield from run([(s, w) for w in chosen for s in seeds if (s, asdict(w)) not in made], steps, False)


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of: a later one takes the place of an earlier one."""
    way = row["way"]
    return (row["seed"], row.get("steps"), row.get("trial"), *(way.items() if row.get("trial") else [way["kind"]]))


def _best(kind: str, trials: dict[Way, float]) -> Way:
    return min((w for w in trials if w.kind == kind), key=trials.__getitem__)
