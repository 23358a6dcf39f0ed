"""Speed of the attention family on a GPU against SDPA (flash and cuDNN), FlexAttention and flash-attn 4, in one process on the
same inputs.

Contenders alternate, L2 is flushed before every call, medians of CUDA events are reported. FLOPs count the products that
the plain formula needs (2 forward and 5 backward, half of them where causal), whatever a kernel recomputes. Beside a forward
stands its limit: the products that this way of computing it does need at the rate of a large matrix product, or its bytes at
the rate of a large copy, whichever takes longer; both rates are measured first. Writes $OUT/attention_cuda.json (with
--decode-grid $OUT/attention_cuda_decode.json), if OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources
from benchmarks.case import Work  # noqa: E402
from benchmarks.ceilings import Ceilings, measure  # noqa: E402
from benchmarks.ops._cuda_peers import PEERS, Peer, find_peers, working  # noqa: E402
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

import effcore.ops.attention  # noqa: E402  (registers the ops)

native = torch.ops.effcore


def time_all(contenders: dict, rounds: int) -> dict[str, float]:
    """Median milliseconds of each contender."""
    flush = torch.zeros(
        64 << 20, dtype=torch.int32, device="cuda"
    )  # read, not written: dirty lines would be written back on our time
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    for name in list(contenders):
        try:
            for _ in range(2):
                contenders[name]()
        except Exception as problem:  # a peer that does not take these inputs
            print(f"  {name}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
            del contenders[name], times[name]
    for _ in range(rounds):
        for name, run in contenders.items():
            flush.amax()
            torch.cuda._sleep(400_000)  # until the host has launched what is timed
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = run()
            end.record()
            del result
            times[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in times.items()}


def training(
    dim: int,
    length: int,
    layers: int,
    rounds: int,
    only: list[str],
    ceilings: Ceilings,
    peers: dict[str, Peer],
    tokens: int = 16384,
    width: int = 2048,
) -> list[dict]:
    """Causal attention of 16k tokens, heads * dim = 2048, bf16."""
    torch.compiler.reset()  # or FlexAttention is compiled anew only so many times
    batch, heads = max(tokens // length, 1), width // dim
    q, k, v, dout = (torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    product = batch * heads * length * length * dim  # FLOPs of one causal product
    none = (None, None, True, None)
    rows = []

    def report(
        what: str, products: float, contenders: dict, ours: tuple[str, ...], limits: dict[str, Work] | None = None
    ) -> None:
        if only and what not in only:
            return
        times = time_all(contenders, rounds)
        theirs = [n for n in peers if n in times]
        best = min(theirs, key=times.__getitem__, default=None)
        least = {n: 1e3 * ceilings.seconds(work) for n, work in (limits or {}).items() if n in times}
        row = {
            "what": what,
            "dim": dim,
            "length": length,
            "ms": times,
            "tflops": {n: products * product / t / 1e9 for n, t in times.items()},
            "of_limit": {n: t / times[n] for n, t in least.items()},
            "ratio": {f"{o}/{peer}": times[peer] / times[o] for o in ours for peer in theirs if o in times},
            "best_peer": best,
            "ratio_to_best_peer": {o: times[best] / times[o] for o in ours if best is not None and o in times},
        }
        rows.append(row)

    def work(done: float, *tensors: torch.Tensor) -> Work:
        """So many products, and each of these tensors read or written once."""
        return Work(flops=done * product, bytes=sum(t.nbytes for t in tensors), dtype="bfloat16")

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return effcore.ops.attention.attention(*inputs, causal=True)

    def forward(attend: Callable, inputs: list[torch.Tensor]) -> Callable:
        return lambda: attend(*inputs)

    def both(attend: Callable, inputs: list[torch.Tensor], grad: torch.Tensor) -> Callable:
        return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)

    peers = working(peers, ours, q, k, v, dout)
    plain = {n: forward(p.attend, p.inputs(q, k, v)) for n, p in peers.items()}
    report(
        "forward",
        2,
        {"effcore": lambda: native.attention(q, k, v, *none)} | plain,
        ("effcore",),
        dict.fromkeys(("effcore", *peers), work(2, q, k, v, q)),
    )
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    report(
        "forward+backward",
        7,
        {"effcore": both(ours, leaves, dout)}
        | {n: both(p.attend, p.inputs(*leaves), *p.inputs(dout)) for n, p in peers.items()},
        ("effcore",),
        dict.fromkeys(("effcore", *peers), work(7, q, k, v, q, dout)),
    )
    out, lse = native.attention(q, k, v, *none)

    def backward_alone(p: Peer, repeats: int = 1) -> Callable:
        inputs, grad = p.inputs(*leaves), p.inputs(dout)[0]
        made = p.attend(*inputs)
        return lambda: [torch.autograd.grad(made, inputs, grad, retain_graph=True) for _ in range(repeats)]

    backward = {"effcore": lambda: native.attention_bwd(dout, q, k, v, out, lse, *none, False)}
    backward |= {n: backward_alone(p) for n, p in peers.items()}
    report("backward", 5, backward, ("effcore",), dict.fromkeys(backward, work(5, q, k, v, out, dout)))
    del backward

    probs = native.attention_with_scores(q, k, v, *none, 1, 1)[2]
    empty = torch.empty(0, device="cuda", dtype=q.dtype)
    slots = (lse, torch.empty_like(q), torch.empty_like(v), torch.zeros((), device="cuda"))
    kept = {"lse": empty, "probs": probs}
    report(
        "owner keeps probs",
        2,
        {"probs": lambda: native.attention_with_scores(q, k, v, *none, 1, 1)} | plain,
        ("probs",),
        {"probs": work(2, q, k, v, q, probs)},
    )
    report(
        "consumer forward",
        2,
        {n: (lambda p=p: native.attention_from_scores(q, k, v, lse, p, *slots, *none)) for n, p in kept.items()}
        | plain,
        ("lse", "probs"),
        {"lse": work(2, q, k, v, q), "probs": work(1, v, q, probs)},
    )
    plain = {n: backward_alone(p) for n, p in peers.items()}
    report(
        "consumer backward",
        5,
        {n: (lambda p=p: native.attention_from_scores_bwd(dout, out, q, k, v, lse, p, *none)) for n, p in kept.items()}
        | plain,
        ("lse", "probs"),
    )
    plain = {n: backward_alone(p, layers) for n, p in peers.items()}

    def group(p):
        for _ in range(layers - 1):
            native.attention_from_scores_bwd(dout, out, q, k, v, lse, p, *none)
        return native.attention_with_scores_bwd(q, k, out, lse, p, lse, [dout] * layers, [v] * layers, [], *none)

    report(
        f"group of {layers} backward",
        5 * layers,
        {n: (lambda p=p: group(p)) for n, p in kept.items()} | plain,
        ("lse", "probs"),
    )
    return rows


def decode_grid() -> list[tuple[int, int, int, int, int]]:
    """Batch, heads, kv heads, keys and head dimension of caches up to 16 GiB."""
    return [
        (batch, 4 * kv_heads if kv_heads < 32 else kv_heads, kv_heads, keys, 128)
        for kv_heads in (1, 2, 8, 32)
        for batch in (1, 4, 16, 64)
        for keys in (512, 2048, 8192, 32768)
        if batch * kv_heads * keys * 128 * 4 <= 16 << 30
    ]


def decoding(batch: int, heads: int, kv_heads: int, keys: int, dim: int, copy: float, rounds: int) -> dict:
    q = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, keys, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)
    _, weights, scales = native.decode_attention(q, k, v, lengths, None, None, True)

    def peer(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)

    times = time_all(
        {
            "decode": lambda: native.decode_attention(q, k, v, lengths, None, None, False),
            "with probs": lambda: native.decode_attention(q, k, v, lengths, None, None, True),
            "from probs": lambda: native.decode_from_probs(weights, scales, v, lengths, None),
            "flash": lambda: peer(SDPBackend.FLASH_ATTENTION),
            "cudnn": lambda: peer(SDPBackend.CUDNN_ATTENTION),
        },
        rounds,
    )
    cache, kept = k.nbytes + v.nbytes, weights.nbytes + scales.nbytes
    moved = {"decode": cache, "with probs": cache + kept, "from probs": v.nbytes + kept, "flash": cache, "cudnn": cache}
    speed = {n: moved[n] / t / 1e9 for n, t in times.items()}
    best = min((n for n in ("flash", "cudnn") if n in times), key=times.__getitem__, default=None)
    return {
        "what": f"decode B{batch} H{heads}/{kv_heads} S{keys} D{dim}",
        "ms": times,
        "tb_per_s": speed,
        "of_copy": {n: s / copy for n, s in speed.items()},
        "best_peer": best,
        "ratio_to_best_peer": times[best] / times["decode"] if best is not None else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[], help="rows of the training table")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--decode-grid", action="store_true", help="decoding over a grid of shapes, and nothing else")
    args = parser.parse_args()
    ceilings = measure("cuda", [torch.bfloat16])
    peers = find_peers(args.peers)
    copy, matmul = ceilings.copy / 1e12, ceilings.matmul["bfloat16"] / 1e12
    rows: list[dict] = []
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_per_s": copy,
        "matmul_tflops": matmul,
        "rows": rows,
    }

    def keep(more: list[dict]) -> None:
        """As they come: a run that is cut off leaves what it had."""
        rows.extend(more)
        if out := os.environ.get("OUT"):
            name = "attention_cuda_decode" if args.decode_grid else "attention_cuda"
            Path(out, f"{name}.json").write_text(json.dumps(report, indent=1))

    if args.decode_grid:
        args.lengths, decode_shapes = [], decode_grid()
    else:
        decode_shapes = [(32, 32, 8, 8192, 128), (8, 32, 8, 32768, 128), (64, 32, 4, 2048, 64), (1, 32, 8, 65536, 128)]
    for dim in args.dims:
        for length in args.lengths:
            keep(training(dim, length, args.layers, args.rounds, args.only, ceilings, peers))
            torch.cuda.empty_cache()
    for shape in decode_shapes if not args.no_decode else []:
        keep([decoding(*shape, copy, args.rounds)])
    print(f"{report['device']}, torch {report['torch']}, copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s")
    for row in rows:
        if "tflops" in row:
            limits = "  ".join(f"{n} {x:.2f}" for n, x in row["of_limit"].items())
            print(
                f"D={row['dim']:<4}S={row['length']:<6}{row['what']:<20}",
                "  ".join(f"{n} {x:.0f}" for n, x in row["tflops"].items()),
                "TFLOP/s |",
                "  ".join(f"{n} {x:.2f}" for n, x in row["ratio"].items()),
                f"| of the limit: {limits}" if limits else "",
            )
        else:
            print(
                f"{row['what']:<32}",
                "  ".join(f"{n} {1e3 * row['ms'][n]:.0f} us {x:.2f}" for n, x in row["of_copy"].items()),
                "of copy bandwidth |",
                f"{row['ratio_to_best_peer']:.2f} of {row['best_peer']}" if row["best_peer"] else "",
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
