"""ResNets at 2×: vanilla, timed ranks, freezing, merging, branching; images a second against the same model dense.

Beside each: what the paper gained, and what a roofline of every layer predicts on this chip (_low_rank_roofline). Each variant
lives in a process of its own (_low_rank_worker): a few compile at once, then they and the dense model run in turns, one at a
time, and their rows are written before the next few compile. cuDNN chooses its kernels itself: where it
times ten for each convolution (torch.backends.cudnn.benchmark) the dense model's take a little longer (`layers --plans 10`).
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ceilings
from benchmarks.claims._low_rank_worker import Spec, Worker, start
from benchmarks.ops import lowrank_cuda
from effcore.methods import low_rank
from effcore.methods.low_rank_layers import find, freeze
from effcore.methods.low_rank_measure import observe
from effcore.methods.low_rank_merge import branch, faster_branches, merge, timed_ranks
from effcore.methods.low_rank_ranks import Timer, by_ratio
from effcore.nn.faster import faster

DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
# Per cent of images a second gained in training and at inference, as the papers have them.
PAPER = {
    (50, "merging"): (43.6, 40.6),
    (152, "vanilla"): (11.7, 13.1),
    (152, "timed ranks"): (15.9, 18.4),
    (152, "freezing"): (31.7, 13.1),
    (152, "merging"): (55.9, 54.9),
}

# Sequential freezing's two periods (2309.03824): the outer factors are frozen, then the inner ones.
SEQUENTIAL = {
    "sequential freezing": ("freezing", "freezing, inner"),
    "timed ranks, sequential freezing": ("timed ranks, freezing", "timed ranks, freezing, inner"),
}
TORCHS = "dense, torch's stem"  # what effcore's saves in all models
# In the order in which they are measured. Those of one group compile together.
GROUPS = (
    ("merging", "timed ranks", "timed ranks, freezing", "timed ranks, freezing, inner"),
    ("freezing", "freezing, inner", "branching", "timed ranks, branching", "vanilla"),
    ("multiples", "merging, timed", "cores only, timed", TORCHS),
)


# Those whose steps are profiled, beside the dense one's.
SPENT = ("merging", "timed ranks", "timed ranks, freezing")
BRANCHES = 4


def resnet(depth: int) -> nn.Module:
    import transformers

    config = transformers.ResNetConfig(depths=DEPTHS[depth], layer_type="bottleneck", num_labels=1000)
    return transformers.ResNetForImageClassification(config)


def variants(cuda: bool, training: bool) -> dict[str, Callable[[nn.Module, dict[str, Any]], Any]]:
    """What each does to the dense model, given ranks where timing finds them (``searched``)."""
    multiple = 64 if cuda else 16  # what default_multiple says

    def by_ratio_of(multiple: int) -> Callable[[nn.Module, dict[str, Any]], Any]:
        return lambda model, ranks: low_rank.decompose(model, 2.0, multiple=multiple)

    def frozen(model: nn.Module, ranks: dict[str, Any], inner: bool = False) -> None:
        low_rank.decompose(model, 2.0, multiple=multiple)
        freeze(model, inner=inner)

    def branched(model: nn.Module, ranks: dict[str, Any]) -> None:
        low_rank.decompose(model, 2.0, multiple=multiple)
        branch(model, BRANCHES)

    def given(model: nn.Module, ranks: dict[str, Any]) -> None:
        low_rank.decompose(model, ranks=ranks)

    def given_branched(model: nn.Module, ranks: dict[str, Any]) -> None:
        """A core that is to be branched has a third number."""
        split = [name for name, rank in ranks.items() if isinstance(rank, tuple) and len(rank) == 3]
        given(model, {name: rank[:2] if name in split else rank for name, rank in ranks.items()})
        if split:
            branch(model, BRANCHES, include=split)

    def given_frozen(model: nn.Module, ranks: dict[str, Any], inner: bool = False) -> None:
        given(model, ranks)
        freeze(model, inner=inner)

    trained: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
        "freezing": frozen,
        "freezing, inner": partial(frozen, inner=True),
        "timed ranks, freezing": given_frozen,
        "timed ranks, freezing, inner": partial(given_frozen, inner=True),
    }
    return {
        **dict.fromkeys(("dense", TORCHS), lambda model, ranks: None),
        "vanilla": by_ratio_of(1),  # the paper's ranks: 38, 77, 154, 309
        "multiples": by_ratio_of(multiple),
        "timed ranks": given,
        "cores only, timed": given,
        "merging": lambda model, ranks: merge(model, 2.0, multiple=multiple),
        "merging, timed": lambda model, ranks: merge(model, ranks=ranks),
        "branching": branched,
        "timed ranks, branching": given_branched,
        **(trained if training else {}),
    }


CORES = r"layer\.1\.convolution"


def searched(spec: Spec) -> dict[str, Any] | None:
    """The ranks that timing finds for a variant, or None where it times nothing. To be called while nothing else runs."""
    if "timed" not in spec.variant:
        return None
    model, x = _dense(spec)
    measure: Any = ("freezing" if "freezing" in spec.variant else "training") if spec.training else "inference"
    if spec.variant.startswith("merging"):
        return dict(timed_ranks(model, 2.0, [x], measure=measure))
    layers = find(model, [CORES] if spec.variant.startswith("cores") else None)[0]
    timer = Timer(observe(model, layers, [x], moments=False), measure)
    choices = [c for c in by_ratio(layers, 2.0, None, timer) if c.rank is not None]
    print(f"{spec}: {len(choices)} of {len(layers)} layers, one by one {_milliseconds(choices)}", flush=True)
    for c in choices:
        print(f"  {c.layer.name} {tuple(c.layer.weight.shape)} {c.rank} {c.dense_ms:.3f} -> {c.ms:.3f}", flush=True)
    return {c.layer.name: c.rank for c in choices}


def _milliseconds(choices: list[Any]) -> str:
    before, after = (sum(getattr(c, name) for c in choices) for name in ("dense_ms", "ms"))
    return f"{before:.2f} ms dense, {after:.2f} ms decomposed"


def _dense(spec: Spec) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if spec.device == "cuda" else torch.float32
    with torch.device(spec.device):
        x = torch.randn(spec.batch, 3, spec.size, spec.size, dtype=dtype)
        model = resnet(spec.depth).to(dtype=dtype, memory_format=torch.channels_last)
    return model.train(spec.training), x.to(memory_format=torch.channels_last)


def made(spec: Spec) -> tuple[nn.Module, Tensor]:
    """The variant, and a batch for it."""
    model, x = _dense(spec)
    variants(spec.device == "cuda", spec.training)[spec.variant](model, dict(spec.ranks or ()))
    return model, x


def made_faster(spec: Spec, model: nn.Module) -> None:
    """On a GPU, the dense model as all others."""
    if spec.device == "cuda" and spec.variant != TORCHS:
        faster(model)


def rates_of(device: str) -> ceilings.Ceilings:
    if device == "cuda":
        return lowrank_cuda.ceilings(torch.zeros(64 << 20, device=device))[0]
    return ceilings.measure(device, [torch.float32])


def measure(
    depths: Iterable[int],
    device: str,
    batch: int | None,
    *,
    passes: Iterable[bool],
    rounds: int,
    ranks: dict[str, dict[str, Any]],
    save: Callable[[], None],
    only: Iterable[str] = (),
    done: Iterable[tuple[str, str, str]] = (),
    at_once: int = 2,
    warm: bool = False,
    ranks_only: bool = False,
    profile: bool = True,
) -> Iterator[dict[str, Any]]:
    """One row for each depth, pass (training or not) and variant; ``done`` ones are left out.

    Args:
        ranks: those found by timing, by the spec's text; what is not there is searched for and written into it.
        save: called when something was written into it.
        at_once: processes that compile at a time.
        warm: compile alone, for the caches that TORCHINDUCTOR_CACHE_DIR names, what needs no timing.
        ranks_only: find the ranks that timing finds, and stop.
        profile: say where a step goes, if it is a GPU's and merging is among the variants.
    """
    done = set(done)
    for depth, training in itertools.product(depths, passes):
        what, images = "training" if training else "inference", batch or (256 if device == "cuda" else 4)
        workers: dict[str, Worker] = {}
        try:
            for group in GROUPS:
                names = [n for n in group if n in variants(device == "cuda", training) and (not only or n in only)]
                names = [n for n in names if (f"ResNet-{depth}", what, n) not in done]
                if not names:
                    continue
                specs = [Spec(depth, n, training, device, images) for n in names]
                if warm:
                    specs = [s for s in specs if _needs_no_timing(s, ranks)]
                specs = [_ranked(spec, ranks, save) for spec in specs]
                if ranks_only:
                    continue
                if "dense" not in workers:
                    specs = [Spec(depth, "dense", training, device, images), *specs]
                workers |= start(specs, at_once)
                if not warm:
                    rates = rates_of(device)
                    yield from _rows(workers, rounds, rates)
                    if profile and device == "cuda" and "merging" in workers:
                        yield _spent(workers, rates)
                for name in [n for n in workers if n != "dense"]:
                    workers.pop(name).end()
        finally:
            for worker in workers.values():
                worker.end()


def _ranked(spec: Spec, ranks: dict[str, dict[str, Any]], save: Callable[[], None]) -> Spec:
    """With the ranks that timing finds for it; those of the variant that it freezes or branches."""

    def cached(spec: Spec, search: Callable[[Spec], dict[str, Any] | None]) -> Spec:
        found = ranks.get(str(spec)) or search(spec)
        if found is None:
            return spec
        ranks[str(spec)] = found
        save()
        pairs = ((name, tuple(rank) if isinstance(rank, list) else rank) for name, rank in found.items())
        return dataclasses.replace(spec, ranks=tuple(pairs))

    of = cached(_searched_for(spec), searched)
    of = dataclasses.replace(of, variant=spec.variant)
    return cached(of, _branched) if of.ranks and spec.variant.endswith(", branching") else of


def _searched_for(spec: Spec) -> Spec:
    variant = spec.variant.removesuffix(", inner").removesuffix(", branching")
    return dataclasses.replace(spec, variant=variant)


def _needs_no_timing(spec: Spec, ranks: dict[str, dict[str, Any]]) -> bool:
    return "timed" not in spec.variant or ("branching" not in spec.variant and str(_searched_for(spec)) in ranks)


def _branched(spec: Spec) -> dict[str, Any]:
    """Its ranks, and a third number where branching is the faster way."""
    model, x = _dense(spec)
    ranks = dict(spec.ranks or ())
    low_rank.decompose(model, ranks=ranks)
    split = faster_branches(model, BRANCHES, [x], measure="training" if spec.training else "inference")
    return {name: (*rank, BRANCHES) if name in split else rank for name, rank in ranks.items()}


def _rows(workers: dict[str, Worker], rounds: int, rates: ceilings.Ceilings) -> Iterator[dict[str, Any]]:
    if "dense" not in workers:
        return
    times: dict[str, list[float]] = {n: [] for n in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.seconds())
    predicted = {name: worker.roofline(rates) for name, worker in workers.items()}
    facts = {name: worker.facts for name, worker in workers.items()}
    for name, periods in SEQUENTIAL.items():
        if all(p in workers for p in periods):  # as many steps of one as of the other
            times[name] = [statistics.mean(pair) for pair in zip(*(times[p] for p in periods), strict=True)]
            predicted[name] = statistics.mean(predicted[p] for p in periods)
            facts[name] = facts[periods[0]]
    dense = workers["dense"].spec
    for name in times:
        if name == "dense":
            continue
        paper = PAPER.get((dense.depth, name))
        ratio = statistics.median(a / b for a, b in zip(times["dense"], times[name], strict=True))
        bound = predicted["dense"] / predicted[name]
        r: dict[str, Any] = {
            "model": f"ResNet-{dense.depth}",
            "variant": name,
            "what": "training" if dense.training else "inference",
            "images": dense.batch,
            "parameters": facts[name]["parameters"],
            "parameters_dense": facts["dense"]["parameters"],
            "gflops": facts[name]["gflops"],
            "gflops_dense": facts["dense"]["gflops"],
            "images_s_dense": dense.batch / statistics.median(times["dense"]),
            "images_s": dense.batch / statistics.median(times[name]),
            "ratio": ratio,
            "ratio_roofline": bound,
            "of_the_roofline": ratio / bound,
            "of_the_roofline_gain": (ratio - 1) / (bound - 1) if bound > 1 else None,
            "seconds_dense_roofline": predicted["dense"],
            "copy_bytes_s": rates.copy,
            "paper_gain_percent": None if paper is None else paper[0 if dense.training else 1],
        }
        print(_line(r), flush=True)
        yield r


def _spent(workers: dict[str, Worker], rates: ceilings.Ceilings) -> dict[str, Any]:
    """Where a step goes, dense and of some variants; without those for which the profiler fails."""
    spec = workers["dense"].spec
    row: dict[str, Any] = {"model": f"ResNet-{spec.depth}", "variant": "spent"}
    row["what"] = "training" if spec.training else "inference"
    for name in ("dense", *SPENT):
        if name not in workers:
            continue
        try:
            row[name] = workers[name].ask("spent", rates)
        except RuntimeError as error:
            print(error, flush=True)
            continue
        kinds = "  ".join(f"{k} {us:,.0f} ({row[name]['roofline_us'][k]:,.0f})" for k, us in row[name]["us"].items())
        print(f"{row['model']} {row['what']} {name}, us of a step and the roofline's: {kinds}", flush=True)
    return row


def _line(r: dict[str, Any]) -> str:
    gain = "" if r["of_the_roofline_gain"] is None else f", {r['of_the_roofline_gain']:.0%} of its gain"
    paper = "" if r["paper_gain_percent"] is None else f"  (paper {1 + r['paper_gain_percent'] / 100:.2f}x)"
    return (
        f"{r['model']} {r['what']:9} {r['variant']:18} {r['parameters'] / 1e6:6.1f} of {r['parameters_dense'] / 1e6:.1f} M  "
        f"{r['gflops']:.2f} of {r['gflops_dense']:.2f} GFLOP  {r['images_s']:7.1f} of {r['images_s_dense']:.1f} images/s  "
        f"{r['ratio']:.2f}x  (roofline {r['ratio_roofline']:.2f}x: {r['of_the_roofline']:.0%}{gain}){paper}"
    )
