"""A variant of a ResNet in a process of its own: it compiles at once with the others, and runs when it is asked to."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceilings import Ceilings
from effcore.methods import low_rank_factor

LEAST_SECONDS = 0.1  # of a measurement: as many steps as that takes


@dataclass(frozen=True)
class Spec:
    depth: int
    variant: str
    training: bool
    device: str
    batch: int
    size: int = 224
    ranks: tuple[tuple[str, Any], ...] | None = None  # by layer, found beforehand by timing

    def __str__(self) -> str:
        return f"ResNet-{self.depth} {'training' if self.training else 'inference'} {self.variant}"


class Worker:
    """The parent's side."""

    def __init__(self, spec: Spec):
        self.spec = spec
        context = multiprocessing.get_context("forkserver")  # torch and transformers are imported once
        context.set_forkserver_preload(
            ["transformers.models.resnet.modeling_resnet", "benchmarks.claims._low_rank_resnet"]
        )
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, spec), daemon=False)
        self.process.start()
        other.close()
        self.facts: dict[str, Any] = self._answer()  # once it has compiled

    def _answer(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except EOFError:
            kind, value = "failed", "its process ended"
        if kind == "failed":
            raise RuntimeError(f"{self.spec}: {value}")
        return value

    def ask(self, what: str, argument: Any = None) -> Any:
        self.connection.send((what, argument))
        return self._answer()

    def seconds(self) -> float:
        """Of one step, after an untimed one."""
        return float(self.ask("seconds"))

    def roofline(self, rates: Ceilings) -> float:
        return float(self.ask("roofline", rates))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(("end", None))
        self.process.join()


def start(specs: list[Spec], at_once: int) -> dict[str, Worker]:
    """Workers that have compiled, ``at_once`` at a time, by variant; those that failed left out."""

    def make(spec: Spec) -> Worker | None:
        try:
            worker = Worker(spec)
        except RuntimeError as error:
            print(error, flush=True)
            return None
        print(f"{spec}: compiled in {worker.facts['seconds_to_compile']:.0f} s", flush=True)
        return worker

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        made = dict(zip((s.variant for s in specs), pool.map(make, specs), strict=True))
    return {variant: worker for variant, worker in made.items() if worker is not None}


class Seam(nn.Module):
    """From the last norm of one bottleneck to the last convolution of the next, either of which may be missing."""

    def __init__(self, before: Any, after: Any):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.before is not None and shortcut is not None:
            kept = self.before.shortcut
            shortcut = shortcut if isinstance(kept, nn.Identity) else kept.normalization(shortcut)
            x = self.before.activation(self.before.layer[2].normalization(x) + shortcut)
        if self.after is None:
            return x, None
        first, core, last = self.after.layer
        kept = self.after.shortcut
        return last.convolution(core(first(x))), x if isinstance(kept, nn.Identity) else kept.convolution(x)


def in_seams(model: nn.Module, compiled: bool) -> Callable[[Tensor], Tensor]:
    """The network's logits, from graphs of the stem and of each seam: in one of them is all that can be fused, the gradients'
    sum at a block's input and the norm before it too, as in one graph of the network; and those of one shape compile once."""
    parts: Any = model
    blocks = [m for m in model.modules() if type(m).__name__ == "ResNetBottleNeckLayer"]
    stem, seams = parts.resnet.embedder, [Seam(*pair) for pair in pairwise([None, *blocks, None])]
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for module in (stem, *seams):
            module.compile(dynamic=False)

    def logits(x: Tensor) -> Tensor:
        x, shortcut = stem(x), None
        for seam in seams:
            x, shortcut = seam(x, shortcut)
        return parts.classifier(parts.resnet.pooler(x))

    return logits


Logits = Callable[[Tensor], Tensor]


def _step(model: nn.Module, logits: Logits, x: Tensor, training: bool) -> None:
    if training:
        model.zero_grad(set_to_none=True)
        logits(x).float().logsumexp(1).sum().backward()
    else:
        with torch.no_grad():
            logits(x)


def _seconds(model: nn.Module, logits: Logits, x: Tensor, training: bool) -> float:
    """Of one step. On a GPU a CUDA graph repeats it, so that no time is one of launching."""
    graph: torch.cuda.CUDAGraph | None = None
    if x.is_cuda:
        graph = _captured(model, logits, x, training)

    def timed(steps: int) -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            if graph is not None:
                graph.replay()
            else:
                _step(model, logits, x, training)
        if x.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    timed(1)
    result = timed(1)
    if result < LEAST_SECONDS:
        result = timed(int(LEAST_SECONDS / result) + 1)
    if graph is not None:  # leave the memory to the others
        graph.reset()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return result


def _captured(model: nn.Module, logits: Logits, x: Tensor, training: bool) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(model, logits, x, training)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(model, logits, x, training)
    return graph


def _patiently(model: nn.Module, logits: Logits, x: Tensor, training: bool) -> None:
    """The first step, among other processes that make theirs: where memory is short, later."""
    for _ in range(20):
        try:
            _step(model, logits, x, training)
            if x.is_cuda:  # leave the memory to the others
                torch.cuda.synchronize()
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            return
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            time.sleep(3)
    raise RuntimeError("no memory for a step")


def any_basis(gram: Tensor) -> tuple[Tensor, Tensor]:
    return gram.new_ones(len(gram)), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _gflops(model: nn.Module, x: Tensor) -> float:
    """Of one image, forward."""
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x[:1])
    model.train(training)
    return counter.get_total_flops() / 1e9


def _serve(connection: Connection, spec: Spec) -> None:
    from benchmarks.claims import _low_rank_resnet as claim
    from benchmarks.run import use_carried_libraries

    try:
        use_carried_libraries()
        low_rank_factor._leading = any_basis  # times do not depend on the weights
        model, x = claim.made(spec)
        facts = {"gflops": _gflops(model, x)}
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        claim.made_faster(spec, model)
        begin = time.perf_counter()
        logits = in_seams(model, compiled=x.is_cuda)
        _patiently(model, logits, x, spec.training)
        facts["seconds_to_compile"] = time.perf_counter() - begin
        connection.send(("ready", facts))
        while (request := connection.recv())[0] != "end":
            connection.send((request[0], _answer_to(request, spec, model, logits, x)))
    except EOFError:
        pass
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        raise


def _answer_to(request: tuple[str, Any], spec: Spec, model: nn.Module, logits: Logits, x: Tensor) -> Any:
    from benchmarks.claims import _low_rank_profile, _low_rank_roofline

    what, rates = request
    if what == "seconds":
        return _seconds(model, logits, x, spec.training)
    if what == "spent":
        return _low_rank_profile.spent(model, x, spec.training, rates, lambda: _step(model, logits, x, spec.training))
    with torch.compiler.set_stance("force_eager"):  # its hooks are not to be compiled
        return _low_rank_roofline.seconds(model, x, spec.training, rates)
