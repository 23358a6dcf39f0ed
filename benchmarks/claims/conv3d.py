"""3D convolutions from 2D and 1D parts: `python -m benchmarks.claims.conv3d speed | unet | profile | patches | accuracy`.

speed: the 3D part of ECO-Lite (a ResNet-18's last three stages on 16 frames of 96 channels at 28²): parameters, FLOPs, clips a
second of training and of inference, for each way to build its convolutions. Conv3D runs in its better memory format. The paper,
whole ECO-Lite on a V100: Conv3D 33.7 M parameters, 35.6 GFLOPs, 773 frames/s; Add 16.3 M, 17.1, 865. Our goal for a training
step is 1.6x.

unet: the same for one level of a 3D U-Net on volumes of 64 channels at 32 x 64²: two convolutions, two at half the resolution
and twice the channels, and two over the joined halves.

profile: which kernels make up a training step of `speed`'s network.

patches: a video transformer's patch embedding (stride = kernel) before and after factorize_conv3d.

accuracy: small networks on moving digits (which digit, and which of 8 directions), equal steps, several seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

import effcore  # noqa: E402
from benchmarks.claims import _kernels, _runs  # noqa: E402
from benchmarks.claims._conv3d_accuracy import accuracy, join  # noqa: E402
from benchmarks.claims._conv3d_networks import METHODS, TASKS, Make, Task  # noqa: E402


class Contender:
    def __init__(
        self,
        task: Task,
        make: Make,
        batch: int,
        device: str,
        dtype: torch.dtype,
        last: bool,
        compiled: str | None = None,
    ):
        torch.manual_seed(0)
        memory = torch.channels_last_3d if last else torch.contiguous_format
        self.model = task.network(make).to(device, memory_format=memory)
        self.run = torch.compile(self.model, mode=compiled) if compiled else self.model
        self.clips = torch.randn(batch, *task.clip, device=device).to(memory_format=memory)
        self.labels = torch.randint(0, task.classes, (batch, *task.label), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.precision = lambda: torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def train(self) -> None:
        self.model.train()
        with self.precision():
            loss = F.cross_entropy(self.run(self.clips), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def infer(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.precision():
            self.run(self.clips)

    def capture(self) -> None:
        """From here on both are replays of one CUDA graph each: no gaps between kernels, whatever the host does."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for name in ("train", "infer"):
            call, graph = getattr(self, name), torch.cuda.CUDAGraph()
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                call()
            setattr(self, name, graph.replay)

    def size(self) -> tuple[int, float]:
        """Parameters, and GFLOPs of one clip (a multiplication and an addition are two)."""
        self.model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(), self.precision():
            self.model(self.clips[:1])
        return sum(p.numel() for p in self.model.parameters()), counter.get_total_flops() / 1e9


def seconds(call: Callable[[], Any], device: str, steps: int = 1) -> float:
    """Of one of so many steps, which the host enqueues without waiting for the device between them."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def speed(
    task: Task,
    device: str,
    batch: int,
    dtype: torch.dtype,
    rounds: int,
    names: list[str],
    compiled: str | None,
    first: bool,
    graphs: bool,
) -> list[dict]:
    torch.backends.cudnn.benchmark = True  # its fastest algorithms
    made = {name: Contender(task, METHODS[name], batch, device, dtype, True, compiled) for name in names}
    if first:
        made["Conv3D, channels first"] = Contender(task, METHODS["Conv3D"], batch, device, dtype, False, compiled)
    for contender in made.values() if graphs else ():
        contender.capture()
    times: dict[str, dict[str, list[float]]] = {name: {"train": [], "infer": []} for name in made}
    for number in range(rounds + 1):
        for name, contender in made.items():
            for kind in ("train", "infer"):
                taken = seconds(getattr(contender, kind), device, 5 if device == "cuda" else 1)
                if number:  # the first round warms up
                    times[name][kind].append(taken)
    dense = [name for name in made if name.startswith("Conv3D")] or names[:1]
    rows = []
    for name, contender in made.items():
        parameters, gflops = contender.size()
        row: dict[str, Any] = {"model": name, "parameters": parameters, "gflops": gflops}
        for kind in ("train", "infer"):
            best = min(dense, key=lambda n: statistics.median(times[n][kind]))
            row[f"{kind} clips/s"] = batch / statistics.median(times[name][kind])
            pairs = zip(times[best][kind], times[name][kind], strict=True)
            row[f"{kind} ratio"] = statistics.median(b / t for b, t in pairs)
        rows.append(row)
        print(
            f"{name:<24} {parameters / 1e6:6.2f} M {gflops:7.1f} GFLOPs  train {row['train clips/s']:8.2f} clips/s "
            f"{row['train ratio']:.2f}x  infer {row['infer clips/s']:8.2f} clips/s {row['infer ratio']:.2f}x",
            flush=True,
        )
    return rows


# Names of kernels that belong to a kind; the first that fits counts.
KINDS = {
    "norms, ReLU, additions": ("triton", "batch_norm", "bn_", "elementwise", "reduce_kernel<512", "reduce_kernel<128"),
    "ours": ("conv3d",),
    "convolutions": (
        "fprop",
        "dgrad",
        "wgrad",
        "conv",
        "implicit",
        "cudnn",
        "nhwc",
        "nchw",
        "cutlass",
        "gemm",
        "nvjet",
    ),
    "optimizer": ("multi_tensor",),
}


def profile(
    task: Task, device: str, batch: int, dtype: torch.dtype, names: list[str], compiled: str | None
) -> list[dict]:
    """Microseconds of each kernel of one training step, and of each kind."""
    torch.backends.cudnn.benchmark = True
    rows = []
    for name in names:
        contender = Contender(task, METHODS[name], batch, device, dtype, True, compiled)
        for _ in range(3):
            contender.train()

        def steps(count: int, contender: Contender = contender) -> None:
            for _ in range(count):
                contender.train()
            torch.cuda.synchronize()

        taken = _kernels.of_a_step(steps, 3)
        kinds = dict.fromkeys([*KINDS, "other"], 0.0)
        for kernel, _, microseconds in taken:
            fits = (kind for kind, parts in KINDS.items() if any(part in kernel for part in parts))
            kinds[next(fits, "other")] += microseconds
        rows.append({"model": name, "microseconds": kinds, "kernels": taken})
        print(f"{name:<8} " + "  ".join(f"{kind} {value:,.0f}" for kind, value in kinds.items()), flush=True)
        for kernel, launches, microseconds in taken[:40]:
            print(f"    {microseconds:9.1f} us {launches:6.1f} x {kernel}", flush=True)
    return rows


def patches(device: str, batch: int, rounds: int) -> list[dict]:
    """ViViT's tubelets: 2 x 16 x 16 of 32 frames at 224², 768 channels. Beside the convolution the product alone, of patches
    that somebody has gathered already: what it costs to gather them is the difference. Milliseconds of a call that is waited
    for, and of one of ten in a row, as in a network."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        layer = nn.Conv3d(3, 768, (2, 16, 16), (2, 16, 16)).to(device, dtype)
        embed = effcore.factorize_conv3d(nn.Sequential(layer), inplace=False)
        clips = torch.randn(batch, 3, 32, 224, 224, device=device).to(dtype)
        gathered = torch.randn(batch * 16 * 14 * 14, 3 * 2 * 16 * 16, device=device).to(dtype)
        product = nn.Sequential(nn.Linear(gathered.shape[1], 768)).to(device, dtype)
        calls = {
            "conv3d": lambda: layer(clips),  # noqa: B023
            "patches": lambda: embed(clips),  # noqa: B023
            "product alone": lambda: product(gathered),  # noqa: B023
        }
        with torch.no_grad():
            error = ((layer(clips) - embed(clips)).norm() / layer(clips).norm()).item()
            for call in calls.values():
                call()
            times = [
                {(name, steps): seconds(call, device, steps) for name, call in calls.items() for steps in (1, 10)}
                for _ in range(rounds)
            ]
        row: dict[str, Any] = {"dtype": str(dtype), "difference": error}
        for steps, what in ((1, "ms"), (10, "in a row ms")):
            row |= {f"{name} {what}": statistics.median(t[name, steps] for t in times) * 1e3 for name in calls}
        rows.append(row)
        print(f"{dtype}: " + ", ".join(f"{key} {row[key]:.3g}" for key in row if key != "dtype"), flush=True)
    return rows


# Options of accuracy that say which runs to make: a file may hold others.
_OF_RUNS = {"only", "seeds"}


def _held(path: Path | None, head: dict[str, Any]) -> list[dict]:
    """The rows of ``path``, from where a run of accuracy goes on; exits where they are of another machine or settings."""
    if path is None or not path.is_file():
        return []
    held = json.loads(path.read_text())
    held["settings"] = {k: v for k, v in held["settings"].items() if k not in _OF_RUNS}
    if other := _runs.differing(head, held):
        sys.exit(f"{path} holds runs with another {other}: give another --json, or remove it")
    return held["rows"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.conv3d", description=__doc__)
    parser.add_argument("claim", choices=(*TASKS, "profile", "patches", "accuracy"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of autocast (default bfloat16 on cuda)")
    parser.add_argument("--batch", type=int, help="clips (default 32 on cuda, 4 for unet, 2 on cpu)")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead"),
        help="all contenders through torch.compile, in this mode (speed, unet and profile)",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="all contenders' whole steps as CUDA graphs (speed, unet)"
    )
    parser.add_argument("--channels-last", action="store_true", help="Conv3D in this format alone (speed and unet)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--steps", type=int, default=400, help="of training (accuracy)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each method's runs (accuracy)")
    parser.add_argument("--join", type=Path, nargs="+", help="reports of runs made apart, instead of runs (accuracy)")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="methods")
    parser.add_argument("--json", type=Path, help="write the numbers")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    if options.graphs and not cuda:
        parser.error("--graphs needs a CUDA device")
    batch = options.batch or (2 if not cuda else 4 if options.claim == "unet" else 32)
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    if options.join:
        report = join(options.join)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
        return 0
    machine = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    apart = {"json"} | (_OF_RUNS if options.claim == "accuracy" else set())
    settings = {k: str(v) for k, v in vars(options).items() if k not in apart and v is not None}

    def write(rows: list[dict]) -> None:
        if options.json:
            report = {"settings": settings, "machine": machine, "torch": torch.__version__, "rows": rows}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1))

    if options.claim in TASKS:
        names = options.only or list(METHODS)
        task, first = TASKS[options.claim], not options.channels_last
        timed = options.rounds, names, options.compile, first, options.graphs
        rows = speed(task, options.device, batch, dtype, *timed)
    elif options.claim == "profile":
        names = options.only or ["Conv3D", "Add"]
        rows = profile(TASKS["speed"], options.device, batch, dtype, names, options.compile)
    elif options.claim == "patches":
        rows = patches(options.device, batch, options.rounds)
    else:
        held = _held(options.json, {"machine": machine, "torch": torch.__version__, "settings": settings})
        names = options.only or list(METHODS)
        rows = accuracy(options.device, dtype, options.steps, options.seeds, names, held, write)
    write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
