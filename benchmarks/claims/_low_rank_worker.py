"""A variant of a ResNet in a process of its own: it compiles at once with the others, and runs when it is asked to."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceilings import Ceilings
from effcore.methods.low_rank_factor import KernelFactors

LEAST_SECONDS = 0.05  # of a measurement: as many steps as that takes


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

    def _ask(self, what: str, argument: Any = None) -> Any:
        self.connection.send((what, argument))
        return self._answer()

    def seconds(self) -> float:
        """Of one step, after an untimed one."""
        return float(self._ask("seconds"))

    def roofline(self, rates: Ceilings) -> float:
        return float(self._ask("roofline", rates))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(("end", None))
        self.process.join()


class Start:
    """Workers that are being made, ``at_once`` at a time, in the order of their specs; ``keep=False`` ends each when it has
    compiled."""

    def __init__(self, specs: list[Spec], at_once: int, *, keep: bool = True):
        self._pool = concurrent.futures.ThreadPoolExecutor(at_once)
        self._keep = keep
        self._made = {spec: self._pool.submit(self._make, spec) for spec in specs}

    def _make(self, spec: Spec) -> Worker | None:
        try:
            worker = Worker(spec)
        except RuntimeError as error:
            print(error, flush=True)
            return None
        parts = ", ".join(f"{k} {v:.1f}" for k, v in worker.facts.items() if k.startswith("seconds"))
        print(f"{spec}: ready ({parts})", flush=True)
        if not self._keep:
            worker.end()
        return worker

    def ready(self, specs: list[Spec]) -> dict[str, Worker]:
        """Waits for these; by variant, those that failed left out."""
        made = {spec.variant: self._made[spec].result() for spec in specs}
        return {variant: worker for variant, worker in made.items() if worker is not None}

    def end(self) -> None:
        self._pool.shutdown()
        for made in self._made.values():
            worker = made.result()
            if worker is not None and self._keep:
                worker.end()


def _compile(model: nn.Module) -> None:
    """The stem and each bottleneck by itself: blocks of one shape compile once, and nothing would be fused across blocks."""
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__ in ("ResNetEmbeddings", "ResNetBottleNeckLayer"):
            module.compile(dynamic=False)


def _step(model: nn.Module, x: Tensor, training: bool) -> None:
    if training:
        model.zero_grad(set_to_none=True)
        model(x).logits.float().logsumexp(1).sum().backward()
    else:
        with torch.no_grad():
            model(x)


def _seconds(model: nn.Module, x: Tensor, training: bool) -> float:
    def timed(steps: int) -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            _step(model, x, training)
        if x.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    timed(1)  # allocates
    result = timed(1)
    if result < LEAST_SECONDS:
        result = timed(int(LEAST_SECONDS / result) + 1)
    if x.is_cuda:  # leave the memory to the others
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return result


def _patiently(model: nn.Module, x: Tensor, training: bool) -> None:
    """The first step, among other processes that make theirs: where memory is short, later."""
    for _ in range(20):
        try:
            return _step(model, x, training)
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            time.sleep(3)
    raise RuntimeError("no memory for a step")


def _gflops(model: nn.Module, x: Tensor) -> float:
    """Of one image, forward."""
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x[:1])
    model.train(training)
    return counter.get_total_flops() / 1e9


def _serve(connection: Connection, spec: Spec) -> None:
    from benchmarks.claims import _low_rank_resnet as claim
    from benchmarks.claims import _low_rank_roofline as roofline
    from benchmarks.run import use_carried_libraries

    try:
        use_carried_libraries()
        begin = time.perf_counter()
        KernelFactors.split.__defaults__ = (1,)  # one sweep of HOOI: times do not depend on the weights
        model, x = claim.made(spec)
        facts = {"seconds_to_make": time.perf_counter() - begin, "gflops": _gflops(model, x)}
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        begin = time.perf_counter()
        if x.is_cuda:
            _compile(model)
        _patiently(model, x, spec.training)
        if x.is_cuda:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        facts["seconds_to_compile"] = time.perf_counter() - begin
        connection.send(("ready", facts))
        while (request := connection.recv())[0] != "end":
            if request[0] == "seconds":
                connection.send(("seconds", _seconds(model, x, spec.training)))
            else:
                connection.send(("roofline", roofline.seconds(model, x, spec.training, request[1])))
    except EOFError:
        pass
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        raise
