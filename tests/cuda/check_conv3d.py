"""The CUDA kernels of the conv3d family against effcore.reference, and their speed against cuDNN, on a GPU.

Every problem is run twice (the bits must agree) in memory filled with NaN; the error against float64 may be at most twice that
of the same-dtype PyTorch computation (no TF32). `--sanitize` runs small problems under compute-sanitizer (memcheck and
racecheck), `--time` compares with Conv3d and with the sum of two convolutions in both memory formats (L2 flushed, medians of
CUDA events, alternating). The tables come last; numbers go to $OUT/conv3d_check.json, if OUT is set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

from benchmarks.timing import clock_for  # noqa: E402
from effcore.ops import patch_embed  # noqa: E402
from effcore.ops.conv3d import cross_conv3d  # noqa: E402
from effcore.reference import conv3d as ref  # noqa: E402
from tests.cuda.checks import Sanitizers, finish, poison  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAST = torch.channels_last_3d
NAMES = ("out", "dx", "dspatial", "dtemporal")

# batch, channels, outputs, (T, H, W), kernel, stride, padding
PROBLEMS = [
    (2, 64, 64, (4, 16, 16), (3, 3, 3), 1, "same"),
    (2, 64, 128, (3, 13, 15), (3, 3, 3), 1, "same"),
    (2, 128, 136, (4, 14, 14), (3, 3, 3), 1, "same"),
    (2, 40, 72, (5, 9, 7), (3, 3, 3), 2, "same"),
    (1, 96, 48, (6, 12, 11), (5, 3, 5), (1, 2, 2), (2, 0, 1)),
    (3, 3, 24, (3, 20, 18), (3, 7, 7), (1, 2, 2), "same"),
    (2, 33, 17, (4, 6, 5), (3, 3, 3), 1, "same"),
    (1, 1, 1, (1, 1, 1), (3, 3, 3), 1, "same"),
    (1, 16, 8, (7, 5, 5), (1, 1, 1), (2, 3, 1), 0),
    (3, 24, 40, (5, 11, 9), (3, 5, 3), 1, (0, 1, 2)),
    (2, 200, 72, (2, 7, 7), (5, 3, 1), 1, "same"),
    (0, 8, 8, (2, 4, 4), (3, 3, 3), 1, "same"),
    (8, 64, 64, (8, 56, 56), (3, 3, 3), 1, "same"),
    (8, 256, 256, (4, 14, 14), (3, 3, 3), 1, "same"),
    (8, 128, 256, (8, 28, 28), (3, 3, 3), 2, "same"),
    # An odd number of column blocks; many taps; strides with several taps a residue; a single block.
    (2, 64, 320, (3, 9, 10), (3, 3, 3), 1, "same"),
    (1, 64, 72, (2, 10, 9), (1, 7, 7), 1, "same"),
    (3, 72, 256, (5, 13, 9), (3, 5, 5), (1, 2, 2), "same"),
    (2, 64, 64, (9, 20, 20), (5, 3, 3), 3, 1),
    (1, 512, 384, (2, 7, 7), (3, 3, 3), 1, "same"),
    # Pairs of frames: outer frames in a row, half a block of channels, few taps, an odd number of frames.
    (2, 128, 128, (5, 14, 14), (5, 3, 3), 1, "same"),
    (1, 96, 200, (6, 11, 12), (7, 3, 3), 1, "same"),
    (1, 256, 64, (4, 12, 9), (3, 1, 1), 1, "same"),
    (1, 320, 128, (3, 8, 10), (3, 1, 3), 1, "same"),
    # Full waves of blocks; odd sizes, kernels, paddings, blocks of channels.
    (8, 128, 128, (8, 28, 28), (3, 3, 3), 1, "same"),
    (1, 128, 128, (20, 6, 6), (3, 3, 3), 1, "same"),
    (3, 200, 136, (5, 9, 11), (3, 3, 3), 1, "same"),
    (4, 128, 256, (9, 26, 30), (3, 3, 3), 1, (0, 1, 2)),
    (2, 192, 192, (16, 21, 19), (5, 3, 3), 1, (1, 0, 1)),
    (4, 128, 64, (16, 40, 40), (3, 3, 3), 1, "same"),
    # Whole lines of several frames; steps along time; margins wider than the kernel needs, or none; lines that no box holds.
    (4, 128, 128, (4, 7, 7), (3, 3, 3), 1, "same"),
    (2, 128, 192, (9, 10, 12), (3, 3, 5), (2, 1, 1), (1, 1, 2)),
    (2, 128, 128, (3, 8, 8), (1, 3, 3), 1, (0, 2, 2)),
    (2, 128, 128, (6, 9, 9), (3, 1, 1), 1, "same"),
    (2, 64, 64, (6, 30, 40), (5, 5, 3), 1, 0),
    (1, 64, 128, (2, 4, 300), (3, 3, 3), 1, "same"),
    # A last block of 32 channels or fewer; in pairs of blocks.
    (2, 96, 128, (4, 28, 28), (3, 3, 3), 1, "same"),
    (1, 288, 160, (2, 14, 14), (3, 3, 3), 1, "same"),
    # Gradients of 128 output channels at a time: taps that divide into blocks unevenly; sides of 7 and none.
    (1, 64, 128, (2, 10, 9), (1, 5, 7), 1, "same"),
    (2, 72, 128, (9, 14, 14), (5, 3, 3), 1, "same"),
    (2, 128, 256, (3, 28, 21), (3, 3, 3), (1, 2, 2), "same"),
]


# batch, channels, outputs, (T, H, W), kernel = stride
PATCHES = [
    (2, 3, 192, (4, 32, 48), (2, 16, 16)),
    (32, 3, 768, (32, 224, 224), (2, 16, 16)),
    (3, 3, 200, (7, 90, 120), (2, 16, 16)),  # voxels that fill no patch; a last tile and a last panel that are not full
    (5, 1, 8, (1, 16, 16), (1, 16, 16)),  # one patch a clip
    (2, 3, 384, (3, 64, 96), (1, 32, 32)),
    (2, 2, 1024, (3, 64, 128), (1, 8, 64)),
    (3, 4, 648, (9, 21, 48), (3, 1, 16)),
    # Rows of two and of four neighbouring patches; depths that end within a step.
    (9, 3, 200, (5, 40, 160), (2, 16, 16)),
    (5, 2, 776, (4, 40, 128), (2, 16, 16)),
    (3, 3, 384, (3, 64, 192), (1, 32, 32)),
    (2, 3, 16, (4, 32, 32), (1, 1, 16)),
    (3, 5, 24, (2, 16, 64), (1, 1, 16)),
    (2, 3, 40, (1, 6, 64), (1, 1, 32)),
]


def channels_inside(kernel: torch.Tensor) -> torch.Tensor:
    """As ``model.to(memory_format=torch.channels_last_3d)`` lays out the parameters of CrossConv3d."""
    return kernel.movedim(1, -1).contiguous().movedim(-1, 1)


def make(problem, dtype: torch.dtype, layout: str):
    batch, channels, outputs, size, kernel, _, _ = problem
    scale = (channels * (kernel[0] + kernel[1] * kernel[2])) ** -0.5
    x = torch.randn(batch, *size, channels + 3, device="cuda").to(dtype)
    x = (x[..., 1 : channels + 1] if layout == "sliced" else x[..., :channels].contiguous()).movedim(-1, 1)
    weights = [torch.randn(outputs, channels, *k, device="cuda") * scale for k in (kernel[1:], kernel[:1])]
    weights = [t.to(dtype) if layout == "sliced" else channels_inside(t.to(dtype)) for t in weights]
    return [x, *weights, torch.randn(outputs, device="cuda").to(dtype)]


def results(function, tensors, gradient, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves[:3], gradient.to(out.dtype))]


def relative(a, b) -> float:
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def check(problems=PROBLEMS) -> list[tuple[str, bool, str]]:
    found = []
    for problem in problems:
        for name, dtype in DTYPES.items():
            for layout in ("channels last", "sliced"):
                label = f"{name} {layout} {problem}"
                options = {"stride": problem[5], "padding": problem[6]}
                tensors = make(problem, dtype, layout)
                doubles = [t.double() for t in tensors]
                shape = ref.cross_conv3d(*doubles, **options).shape
                gradient = torch.randn(shape, device="cuda").to(dtype)
                poison()
                try:
                    ours = results(cross_conv3d, tensors, gradient, **options)
                    again = results(cross_conv3d, tensors, gradient, **options)
                    torch.cuda.synchronize()
                except Exception as error:
                    found.append((label, False, f"{type(error).__name__}: {error}"[:300]))
                    continue
                exact = results(ref.two_branches, doubles, gradient.double(), **options)
                same = results(ref.cross_conv3d, tensors, gradient, **options)
                wrong = []
                if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
                    wrong.append("two runs differ")
                if not ours[0].is_contiguous(memory_format=LAST):
                    wrong.append("out is not in channels_last_3d")
                for what, a, b, c in zip(NAMES, ours, same, exact, strict=True):
                    # In float32 what is left is the order of some thousand additions.
                    rounding = (6 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
                    error, allowed = relative(a, c), 2 * relative(b, c) + rounding
                    if not error <= allowed:
                        wrong.append(f"{what} off by {error:.1e}, allowed {allowed:.1e}")
                found.append((label, not wrong, "; ".join(wrong)))
    return found


def make_patches(problem, dtype: torch.dtype, layout: str):
    batch, channels, outputs, size, kernel = problem
    voxels = torch.randn(batch, channels + 1, *size, device="cuda").to(dtype)
    x = voxels[:, 1:] if layout == "sliced" else voxels[:, 1:].contiguous()
    if layout == "frames outside":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = (
        torch.randn(outputs, channels, *kernel, device="cuda") * (channels * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    )
    return [x, weight.to(dtype), torch.randn(outputs, device="cuda").to(dtype)]


def check_patches(problems=PATCHES) -> list[tuple[str, bool, str]]:
    """Patch embeddings that the kernel serves: out and the gradients against float64, beside a product of gathered patches."""
    found = []
    for problem in problems:
        for name in ("bf16", "fp16"):
            for layout in ("contiguous", "sliced", "frames outside"):
                label = f"{name} {layout} patches {problem}"
                tensors = make_patches(problem, DTYPES[name], layout)
                doubles = [t.double() for t in tensors]
                gradient = torch.randn_like(patch_embed._gathered(*tensors))
                wrong = [] if patch_embed._reads_in_place(*tensors[:2]) else ["patches are gathered"]
                poison()
                try:
                    ours = results(patch_embed.patch_embed3d, tensors, gradient)
                    again = results(patch_embed.patch_embed3d, tensors, gradient)
                    torch.cuda.synchronize()
                except Exception as error:
                    found.append((label, False, f"{type(error).__name__}: {error}"[:300]))
                    continue
                exact = results(patch_embed._gathered, doubles, gradient.double())
                same = results(patch_embed._gathered, tensors, gradient)
                if not torch.equal(ours[0], again[0]):
                    wrong.append("two runs differ")
                if not ours[0].is_contiguous(memory_format=LAST):
                    wrong.append("out is not in channels_last_3d")
                for what, a, b, c in zip(("out", "dx", "dweight", "dbias"), ours, same, exact, strict=True):
                    error, allowed = relative(a, c), 2 * relative(b, c) + 2 * torch.finfo(a.dtype).eps
                    if not error <= allowed:
                        wrong.append(f"{what} off by {error:.1e}, allowed {allowed:.1e}")
                found.append((label, not wrong, "; ".join(wrong)))
    return found


# ---------------------------------------------------------------- speed

SHAPES = [(8, 64, 16, 56), (8, 128, 8, 28), (8, 256, 4, 14)]


def candidates(shape, dtype=torch.bfloat16):
    batch, channels, frames, side = shape
    scale = (12 * channels) ** -0.5
    spatial = (torch.randn(channels, channels, 3, 3, device="cuda") * scale).to(dtype)
    temporal = (torch.randn(channels, channels, 3, device="cuda") * scale).to(dtype)
    voxels = torch.randn(batch, channels, frames, side, side, device="cuda").to(dtype)
    gradient = torch.randn_like(voxels)
    kernels = {
        "conv3d": [ref.dense_kernel(spatial, temporal)],
        "two convolutions": [spatial[:, :, None], temporal[..., None, None]],
    }

    def dense(x, w):
        return F.conv3d(x, w, padding=1)

    def composed(x, across, along):
        return F.conv3d(x, across, padding=(0, 1, 1)) + F.conv3d(x, along, padding=(1, 0, 0))

    inside = [channels_inside(spatial), channels_inside(temporal)]
    made = {"effcore": (cross_conv3d, [voxels.contiguous(memory_format=LAST), *inside], LAST)}
    made["effcore, kernels contiguous"] = (
        cross_conv3d,
        [voxels.contiguous(memory_format=LAST), spatial, temporal],
        LAST,
    )
    for what, call in (("conv3d", dense), ("two convolutions", composed)):
        for order, memory in (("last", LAST), ("first", torch.contiguous_format)):
            tensors = [t.contiguous(memory_format=memory) for t in (voxels, *kernels[what])]
            made[f"{what}, channels {order}"] = (call, tensors, memory)

    def forward(call, tensors):
        def run():
            with torch.no_grad():
                call(*tensors)

        return run

    def backward(call, tensors, memory):
        leaves = [t.detach().requires_grad_() for t in tensors]
        dout = gradient.contiguous(memory_format=memory)
        return lambda: torch.autograd.grad(call(*leaves), leaves, dout)

    yield "forward", {name: forward(call, tensors) for name, (call, tensors, _) in made.items()}
    yield "forward, backward", {name: backward(*rest) for name, rest in made.items()}
    native, ones = torch.ops.effcore, [1, 1, 1]
    x, dout = made["effcore"][1][0], gradient.contiguous(memory_format=LAST)
    yield (
        "parts",
        {
            "data": lambda: native.cross_conv3d_bwd_data(dout, spatial, temporal, ones, ones, frames, side, side),
            "weight": lambda: native.cross_conv3d_bwd_weight(x, dout, [3] * 3, ones, ones, True),
        },
    )


def flops(shape) -> int:
    """Of the 11 taps of the cross, those beyond the border too, as torch counts."""
    batch, channels, frames, side = shape
    return 2 * 11 * channels * channels * batch * frames * side * side


def matmul_rate(clock, size: int = 8192) -> float:
    """FLOP/s of torch's bfloat16 product of large matrices: what the tensor cores do at the clock that they keep."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(clock(lambda: a @ b) for _ in range(9))


def speed(rounds: int = 15) -> list[dict]:
    clock = clock_for("cuda")
    torch.backends.cudnn.benchmark = True
    rows: list[dict] = []
    rate = matmul_rate(clock)
    for shape in SHAPES:
        for what, calls in candidates(shape):
            for call in calls.values():
                for _ in range(3):
                    call()
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(clock(call) * 1e6)
            row: dict = {"what": what, "shape": shape, "us": {n: statistics.median(t) for n, t in times.items()}}
            if "effcore" in times:
                work = flops(shape) * (1 if what == "forward" else 3)
                row["bound us"] = work / rate * 1e6  # if all of it ran as a large product does
            for peer in ("conv3d", "two convolutions"):
                names = [n for n in times if n.startswith(peer)]
                if "effcore" in times and names:
                    best = min(names, key=lambda n: row["us"][n])
                    row[f"against {peer}"] = statistics.median(
                        b / a for a, b in zip(times["effcore"], times[best], strict=True)
                    )
            rows.append(row)
    return rows


def speed_of_patches(rounds: int = 15) -> list[dict]:
    """Tubelets of 2 x 16² of 32 clips of 32 frames at 224², 768 channels, beside the product of patches gathered before."""
    clock = clock_for("cuda")
    x, weight, bias = make_patches(PATCHES[1], torch.bfloat16, "contiguous")
    gathered, matrix = patch_embed._gather(x, weight.shape[2:]).flatten(0, -2), weight.flatten(1)
    calls = {
        "effcore": lambda: patch_embed.patch_embed3d(x, weight, bias),
        "product of gathered patches": lambda: F.linear(gathered, matrix, bias),
        "gathering, product": lambda: patch_embed._gathered(x, weight, bias),
    }
    with torch.no_grad():
        for call in calls.values():
            call()
        times = [{name: clock(call) * 1e6 for name, call in calls.items()} for _ in range(rounds)]
        rate = matmul_rate(clock)
    ratio = statistics.median(t["product of gathered patches"] / t["effcore"] for t in times)
    return [
        {
            "what": "patches",
            "shape": [*x.shape, *weight.shape],
            "us": {name: statistics.median(t[name] for t in times) for name in calls},
            "bound us": 2 * gathered.numel() * len(matrix) / rate * 1e6,
            "against product of gathered patches": ratio,
        }
    ]


# ---------------------------------------------------------------- sanitizer

SMALL = [
    (1, 64, 64, (2, 6, 5), (3, 3, 3), 1, "same"),
    (1, 72, 136, (3, 6, 5), (3, 3, 3), (1, 2, 2), "same"),
    (2, 64, 256, (2, 8, 9), (3, 3, 3), 2, "same"),
    (1, 16, 40, (4, 96, 96), (3, 3, 3), 1, "same"),  # enough positions for tall blocks
    (1, 16, 72, (4, 96, 96), (3, 3, 3), 1, "same"),
    (1, 128, 136, (2, 14, 14), (3, 3, 3), 1, "same"),  # few enough tiles for pairs of blocks
    (1, 64, 64, (3, 8, 9), (5, 3, 3), 1, "same"),  # outer frames in a row
    (1, 128, 64, (3, 7, 7), (3, 1, 3), 1, "same"),  # few taps
    (1, 96, 128, (2, 14, 14), (3, 3, 3), 1, "same"),  # a block of 32 channels; deep steps
    (1, 5, 3, (2, 5, 4), (3, 3, 3), 2, "same"),
]


SMALL_PATCHES = [
    (3, 3, 200, (4, 34, 48), (2, 16, 16)),
    (140, 1, 776, (2, 64, 64), (1, 16, 16)),  # several tiles a block
    (2, 1, 64, (1, 32, 64), (1, 2, 32)),
    (3, 5, 24, (2, 16, 64), (1, 1, 16)),
]


def run_small() -> None:
    for problem in SMALL_PATCHES:
        for dtype in (torch.bfloat16, torch.float16):
            patch_embed.patch_embed3d(*make_patches(problem, dtype, "contiguous"))
    for problem in SMALL:
        for dtype in DTYPES.values():
            tensors = make(problem, dtype, "sliced" if problem[1] == 72 else "channels last")
            leaves = [t.detach().requires_grad_() for t in tensors]
            cross_conv3d(*leaves, stride=problem[5], padding=problem[6]).sum().backward()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer as well")
    parser.add_argument("--time", action="store_true", help="measure speed as well")
    parser.add_argument("--small", action="store_true", help="only run small problems (what the sanitizer runs)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    if args.small:
        run_small()
        return 0
    found = check() + check_patches()
    if args.sanitize:
        found += Sanitizers(__file__, "conv3d").results()
    times = [*speed(), *speed_of_patches()] if args.time else []
    for row in times:
        ratios = "  ".join(f"{key} {row[key]:.2f}x" for key in row if key.startswith("against"))
        bound = f"  bound {row['bound us']:.1f}" if "bound us" in row else ""
        print(
            row["what"], row["shape"], ratios, "| us:", "  ".join(f"{n} {t:.1f}" for n, t in row["us"].items()), bound
        )
    return finish("conv3d", found, speed=times)


if __name__ == "__main__":
    sys.exit(main())
