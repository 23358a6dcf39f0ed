"""Layer groups on a GPU, forward and backward through autograd, against as many layers of SDPA (flash, cuDNN) and flash-attn 4.

One process, the same inputs, contenders alternate, L2 is flushed before every call; medians of CUDA events. A QK group of n
layers has one softmax(QK^T) and n values (from the log-sum-exp, or with P kept); a KV group has one K, V and n queries. The
peers run n full layers. TFLOP/s count what those need (7 products a layer, half of them where causal), so ours compare; the
limit of a row is what this way of computing needs, at the rate of a large matrix product or of a large copy, whichever takes
longer. Writes $OUT/attention_cuda_groups.json, if OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources
from benchmarks.case import Work  # noqa: E402
from benchmarks.ceilings import measure  # noqa: E402
from benchmarks.ops._cuda_peers import PEERS, Peer, find_peers, working  # noqa: E402
from benchmarks.ops.attention_cuda import native, time_all  # noqa: E402
from effcore.ops import attention as ops  # noqa: E402  (the benchmark has put the package on the path)

PRODUCTS = 7  # of a layer's forward and backward: 2 and 5


def backward_alone(peers: dict[str, Peer], q, k, v, dout) -> dict:
    out, lse = native.attention(q, k, v, None, None, True, None)

    def theirs(peer: Peer) -> Callable:
        inputs, grad = peer.inputs(*(t.detach().requires_grad_() for t in (q, k, v))), peer.inputs(dout)[0]
        made = peer.attend(*inputs)
        return lambda: torch.autograd.grad(made, inputs, grad, retain_graph=True)

    return {"effcore": lambda: native.attention_bwd(dout, q, k, v, out, lse, None, None, True, None, False)} | {
        name: theirs(peer) for name, peer in peers.items()
    }


def qk_group(peers: dict[str, Peer], q, k, values, douts) -> dict:
    def ours(keep):
        out, scores = ops.attention_with_scores(q, k, values[0], consumers=len(values) - 1, keep=keep, causal=True)
        outs = [out, *(ops.attention_from_scores(s, v) for s, v in zip(scores, values[1:], strict=True))]
        return torch.autograd.grad(outs, (q, k, *values), douts)

    def theirs(peer: Peer) -> Callable:
        leaves, grads = peer.inputs(q, k, *values), peer.inputs(*douts)
        return lambda: torch.autograd.grad([peer.attend(leaves[0], leaves[1], v) for v in leaves[2:]], leaves, grads)

    return {keep: partial(ours, keep) for keep in ("lse", "probs")} | {
        name: theirs(peer) for name, peer in peers.items()
    }


def kv_group(peers: dict[str, Peer], queries, k, v, douts) -> dict:
    def ours():
        shared = ops.share_kv(k, v)
        outs = [ops.attention_shared_kv(q, shared, causal=True) for q in queries]
        return torch.autograd.grad(outs, (*queries, k, v), douts)

    def theirs(peer: Peer) -> Callable:
        leaves, grads = peer.inputs(k, v, *queries), peer.inputs(*douts)
        return lambda: torch.autograd.grad([peer.attend(q, *leaves[:2]) for q in leaves[2:]], leaves, grads)

    return {"float32 sums": ours} | {name: theirs(peer) for name, peer in peers.items()}


def measure_shape(
    dim: int, length: int, sizes: list[int], rounds: int, ceilings, peers: dict[str, Peer], tokens=16384, width=2048
) -> list[dict]:
    batch, heads = max(tokens // length, 1), width // dim

    def new(requires_grad: bool = True) -> torch.Tensor:
        x = torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_(requires_grad)

    product = batch * heads * length * length * dim  # FLOPs of one causal product
    kept = batch * heads * length * length  # bytes of P in 16 bits, causal
    rows = []

    def report(what: str, products: float, contenders: dict, needed: dict[str, Work]) -> None:
        times = time_all(contenders, rounds)
        limits = {name: 1e3 * ceilings.seconds(work) for name, work in needed.items() if name in times}
        peer = min(times[name] for name in peers if name in times)
        ours = [name for name in times if name not in peers]
        rows.append(
            {
                "what": what,
                "dim": dim,
                "length": length,
                "ms": times,
                "tflops": {name: products * product / t / 1e9 for name, t in times.items()},
                "limit_ms": limits,
                "ratio_to_best_peer": {name: peer / times[name] for name in ours},
                "limit_of_ratio": {name: peer / limits[name] for name in ours if name in limits},
            }
        )

    def work(products: float, read: float = 0.0) -> Work:
        return Work(flops=products * product, bytes=read, dtype="bfloat16")

    q, k, v, dout = new(), new(), new(), new(False)
    peers = working(peers, partial(ops.attention, causal=True), q, k, v, dout)
    report("backward", 5, backward_alone(peers, q.detach(), k.detach(), v.detach(), dout), {"effcore": work(5)})
    for n in sizes:
        tensors, douts = [new() for _ in range(n)], [new(False) for _ in range(n)]
        # P is written once, and read by every consumer's forward and backward and by the owner's backward.
        needed = {"lse": work(5 * n + 2), "probs": work(3 * n + 3, 2 * n * kept)}
        report(f"QK group of {n}", PRODUCTS * n, qk_group(peers, q, k, tensors, douts), needed)
        report(
            f"KV group of {n}",
            PRODUCTS * n,
            kv_group(peers, tensors, k, v, douts),
            {"float32 sums": work(PRODUCTS * n)},
        )
        del tensors, douts
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--layers", type=int, nargs="*", default=[4])
    parser.add_argument("--peers", nargs="*", default=("flash", "cudnn", "flash-attn 4"), choices=PEERS)
    args = parser.parse_args()
    ceilings, peers = measure("cuda", [torch.bfloat16]), find_peers(args.peers)
    rows: list[dict] = []
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    for dim in args.dims:
        for length in args.lengths:
            rows += measure_shape(dim, length, args.layers, args.rounds, ceilings, peers)
            if out := os.environ.get("OUT"):  # as they come: a run that is cut off leaves what it had
                Path(out, "attention_cuda_groups.json").write_text(json.dumps(report, indent=1))
    print(f"{report['device']}, torch {report['torch']}")
    for row in rows:
        speeds = "  ".join(f"{name} {x:.0f}" for name, x in row["tflops"].items())
        ratios = "  ".join(
            f"{name} {x:.2f} of the best peer (limit {row['limit_of_ratio'].get(name, float('nan')):.2f})"
            for name, x in row["ratio_to_best_peer"].items()
        )
        print(f"D={row['dim']:<4}S={row['length']:<6}{row['what']:<16} {speeds} TFLOP/s | {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
