"""FlowHN's claims on one GPU: `python -m benchmarks.claims.flowhn train | blocks | peers | profile | decode | loss`.

train: tokens a second and MFU of training steps (1024 tokens, bfloat16, fused AdamW) for each strategy, the sequential hybrid
and a LLaMA of as many parameters, layers compiled; beside each FAC's ratio to it and what the FLOPs predict. Our
goals at 350M: 93 % of the predicted ratio. The paper, 65k tokens of vocabulary: FAC 1.68x no split at 350M, 1.83x at 1B.

blocks: the same without embeddings and head, forward and backward. Our goal: FAC 1.80x no split.

peers: training steps of transformers' Falcon-H1 and Jamba classes beside FAC, on each footing that the machine can give them:
with mamba-ssm's and causal-conv1d's kernels, and with these beside compiled layers; their torch paths compiled; and as pip
installs them, without kernels and compiler (few steps, as these are slow). Our goal with the kernels: 1.3x.

profile: where the GPU's time goes in FAC's blocks, forward and backward, and what moving tokens costs: the blocks' time less
that of the same blocks with every token left where it is. Our goal: at most 3 %.

decode: milliseconds a token behind 8192 tokens, beside the LLaMA, as the models run and from CUDA graphs (_flowhn_decode.py).
Our goal: no step slower than the LLaMA's.

loss: the strategies at equal tokens of a real text: validation loss (_flowhn_loss.py). The paper's 1B accuracies: no split
42.95, AE 40.17, FA 38.50, FAC 41.97, sequential 42.06.

MFU has one definition: three times the forward's FLOPs (_hybrids.forward_flops) over the card's dense bfloat16 peak.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.claims import _flowhn_decode, _flowhn_loss
from benchmarks.claims import _hybrids as hybrids
from benchmarks.claims import _sharing as sharing
from effcore.methods.flowhn import block_flops

LENGTH = 1024


def _peak() -> float | None:
    name = torch.cuda.get_device_name() if sharing.CUDA else ""
    return next((peak for card, peak in hybrids.HALF_PRECISION_PEAK.items() if card in name), None)


def _make(name: str, size: str, length: int) -> Any:
    torch.manual_seed(0)
    strategy = next((s for s, shown in hybrids.STRATEGIES.items() if shown == name), None)
    make = hybrids.flowhn if strategy else hybrids.other
    return make(strategy or name, size, length, sharing.DEVICE, sharing.DTYPE)


def _names(models: Iterable[str]) -> list[str]:
    return [hybrids.STRATEGIES.get(m, m) for m in models]


def _rows(
    steps: dict[str, Any],
    flops: dict[str, float],
    tokens: int,
    texts: int,
    rounds: int,
    *,
    slow: bool = False,
    **more: Any,
) -> list[dict]:
    """Measures the steps in turns; FAC's ratio to each, with the ratio of their FLOPs (forward, of one text)."""
    times = sharing.in_turns(steps, rounds=rounds, repeats=1 if slow else 3, warm_up=0 if slow else 3)
    fac, peak, rows = hybrids.STRATEGIES["fac"], _peak(), []
    for name, values in times.items():
        row: dict[str, Any] = {**more, "model": name, "tokens/s": tokens / statistics.median(values)}
        row["mfu"] = 3 * flops[name] * texts / statistics.median(values) / peak if peak else None
        row["fac_ratio"] = statistics.median(t / f for t, f in zip(values, times[fac], strict=True))
        row["predicted_ratio"] = flops[name] / flops[fac]
        row["reached"] = row["fac_ratio"] / row["predicted_ratio"]
        shown = f"{row['mfu']:.1%}" if peak else "-"
        print(
            f"  {name:<26} {row['tokens/s']:10,.0f} tokens/s  MFU {shown:>6}  FAC is {row['fac_ratio']:.2f}x as fast "
            f"(FLOPs {row['predicted_ratio']:.2f}x, {row['reached']:.0%})",
            flush=True,
        )
        rows.append(row)
    return rows


def _training(
    names: list[str], size: str, batch: int, length: int, rounds: int, *, compiled: bool, **more: Any
) -> list[dict]:
    steps, flops, counts = {}, {}, {}
    for name in names:
        model = _make(name, size, length)
        flops[name], counts[name] = hybrids.forward_flops(model, length), hybrids.parameters(model)
        try:
            step = sharing.Training(hybrids.compiled(model) if compiled else model, batch, length)
            step()
            sharing.synchronize()
        except Exception as error:  # one model that does not run here must not hide the others
            print(f"  {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        steps[name] = step
    rows = _rows(
        steps, flops, batch * length, batch, rounds, size=size, length=length, batch=batch, compiled=compiled, **more
    )
    for row in rows:
        row["parameters"] = counts[row["model"]]
    return rows


def train(report: sharing.Report, size: str, batch: int, length: int, rounds: int, models: Sequence[str]) -> None:
    print(f"training, {size}, {batch} texts of {length} tokens", flush=True)
    report.add(_training(_names(models), size, batch, length, rounds, compiled=True, what="train"))


PEERS = {"falcon-h1": "Falcon-H1 (transformers)", "jamba": "Jamba (transformers)"}
# What peers run on: kernels, as the table calls them; whether layers are compiled; and whether mamba-ssm and causal-conv1d
# must be installed, or must not.
FOOTINGS: dict[str, tuple[str, bool, bool]] = {
    "kernels": ("mamba-ssm and causal-conv1d", False, True),
    "kernels-compiled": ("mamba-ssm and causal-conv1d, beside the graphs", True, True),
    "torch-compiled": ("transformers' torch paths", True, False),
    "installed": ("none: as installed", False, False),
}


def peers(
    report: sharing.Report,
    size: str,
    batch: int,
    length: int,
    rounds: int,
    names: Sequence[str],
    footings: Sequence[str],
) -> None:
    built = all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))
    print(f"training beside transformers' hybrids, {size}, {batch} texts of {length}", flush=True)
    for footing in footings:
        kernels, compiled, needs = FOOTINGS[footing]
        if needs != built:
            continue
        print(f" layers compiled: {compiled}, kernels: {kernels}", flush=True)
        for name in names:
            pair: list[str] = [hybrids.STRATEGIES["fac"], PEERS[name]]
            more: dict[str, Any] = {"kernels": kernels, "compiled": compiled, "slow": footing == "installed"}
            with hybrids.kernels_beside_graphs() if footing == "kernels-compiled" else nullcontext():
                report.add(_training(pair, size, batch, length, rounds, what="peers", **more))
            sharing.free()


class _Blocks:
    """Forward and backward of the decoder's blocks, in a model without a language head's work."""

    def __init__(self, model: Any, batch: int, length: int):
        self.layers, self.model = model.model.layers, model.model
        self.hidden = torch.randn(batch, length, model.config.hidden_size, device=sharing.DEVICE, dtype=sharing.DTYPE)
        self.grad = torch.randn_like(self.hidden)
        self.routes = model.model.router.uniform(batch, 0, length, self.hidden.device)

    def __call__(self) -> None:
        hidden = self.hidden
        for block, route in zip(self.layers, self.routes, strict=True):
            hidden = block(hidden, route)
        hidden.backward(self.grad)
        for p in self.layers.parameters():
            p.grad = None


def blocks(report: sharing.Report, size: str, batch: int, length: int, rounds: int, models: Sequence[str]) -> None:
    print(f"blocks alone, forward and backward, {size}, {batch} texts of {length} tokens", flush=True)
    steps, flops = {}, {}
    for name in _names(m for m in models if m in hybrids.STRATEGIES):
        model = hybrids.compiled(_make(name, size, length)).train()
        steps[name] = _Blocks(model, batch, length)
        flops[name] = model.config.num_hidden_layers * block_flops(model.config)
    report.add(_rows(steps, flops, batch * length, batch, rounds, size=size, length=length, batch=batch, what="blocks"))


KINDS = {
    "moving tokens, with what they are moved for": ("routing::", "_index_"),
    "scan": ("scan::",),
    "attention": ("attention",),
    "products": ("gemm", "nvjet", "cutlass"),
}


class _InPlace:
    """A step in which no token moves: both branches take rows as they lie. Equal work otherwise; results without a meaning."""

    def __init__(self, step: Any):
        self.step = step

    def __call__(self) -> None:
        def cut(x: torch.Tensor, order: Any, inverse: Any, sizes: list[int] | None = None) -> Any:
            return (x,) if sizes is None else x.split(sizes)

        with mock.patch("effcore.ops.routing.permute_tokens", cut):
            self.step()


def _moving(size: str, batch: int, length: int, rounds: int) -> list[dict]:
    steps: dict[str, Any] = {}
    for name, wrap in (("moved", lambda step: step), ("in place", _InPlace)):
        model = hybrids.compiled(_make(hybrids.STRATEGIES["fac"], size, length)).train()
        steps[name] = wrap(_Blocks(model, batch, length))
    times = sharing.in_turns(steps, rounds=rounds, repeats=3)
    share = statistics.median(1 - b / a for a, b in zip(times["moved"], times["in place"], strict=True))
    row = {"what": "profile", "size": size, "batch": batch, "length": length, "kind": "moving tokens", "share": share}
    row |= {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    print(f"  moving tokens: {row['moved_ms']:.2f} ms, in place {row['in place_ms']:.2f} ms: {share:.1%}", flush=True)
    return [row]


def profile(report: sharing.Report, size: str, batch: int, length: int, rounds: int) -> None:
    """Shares of the GPU's time, kernels sorted by their names; the rest are norms, gates and sums."""
    print(f"where the time of FAC's blocks goes, {size}, {batch} texts of {length} tokens", flush=True)
    report.add(_moving(size, batch, length, rounds))
    sharing.free()
    step = _Blocks(hybrids.compiled(_make(hybrids.STRATEGIES["fac"], size, length)).train(), batch, length)
    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CUDA if sharing.CUDA else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(3):
            step()
        sharing.synchronize()
    spent: dict[str, float] = {}
    for event in trace.key_averages():
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "rest")
        own = event.self_device_time_total if sharing.CUDA else event.self_cpu_time_total
        spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    rows: list[dict] = []
    for kind, microseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind:<45} {microseconds / 3e3:9.2f} ms {microseconds / total:6.1%}", flush=True)
        row = {"what": "profile", "size": size, "batch": batch, "length": length, "kind": kind}
        rows.append(row | {"ms": microseconds / 3e3, "share": microseconds / total})
    report.add(rows)


def decode(report: sharing.Report, size: str, batch: int, context: int, models: Sequence[str]) -> None:
    names = _names(m for m in models if m in ("fac", "LLaMA"))
    _flowhn_decode.decode(report, size, batch, context, {n: partial(_make, n, size, LENGTH) for n in names})


def main(arguments: list[str] | None = None) -> int:
    parser = sharing.arguments("flowhn", __doc__ or "", ("train", "blocks", "peers", "profile", "decode", "loss"))
    parser.add_argument("--size", default="350M", help="135M, 350M or 1B")
    every = (*hybrids.STRATEGIES, "LLaMA")
    parser.add_argument(
        "--models", nargs="+", choices=every, default=every, help="of train, blocks (fac among them), decode and loss"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=tuple(PEERS), help="of peers")
    parser.add_argument(
        "--footings", nargs="+", choices=FOOTINGS, default=tuple(FOOTINGS), help="of peers: what they run on"
    )
    parser.add_argument("--batch", type=int, default=32, help="texts a step")
    parser.add_argument("--steps", type=int, default=300, help="of a training (loss)")
    parser.add_argument("--seed", type=int, default=0, help="of a training (loss)")
    parser.add_argument("--plot", type=Path, help="a picture of the losses")
    parser.add_argument("--speeds", type=Path, help="train's JSON, for the picture")
    options = parser.parse_args(arguments)
    size, batch, length = ("toy", 2, 64) if options.quick else (options.size, options.batch, LENGTH)
    context = length if options.quick else 8192
    report = sharing.Report(options.json, f"flowhn {options.claim}")
    if options.claim == "loss":
        steps = 4 if options.quick else options.steps
        rows = _flowhn_loss.loss(report, size, batch, length, steps, options.seed, options.models)
        if options.plot:
            speeds = json.loads(options.speeds.read_text())["rows"] if options.speeds else []
            _flowhn_loss.plot(options.plot, rows, speeds)
        return 0
    sizes: tuple[Any, ...] = (report, size, batch, length, options.rounds)
    calls: dict[str, Callable[[], None]] = {
        "train": lambda: train(*sizes, options.models),
        "blocks": lambda: blocks(*sizes, options.models),
        "peers": lambda: peers(*sizes, options.peers, options.footings),
        "profile": lambda: profile(*sizes),
        "decode": lambda: decode(report, size, batch, context, options.models),
    }
    calls[options.claim]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
