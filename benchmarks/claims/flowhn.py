"""FlowHN's claims on one GPU: `python -m benchmarks.claims.flowhn train | blocks | peers | profile | decode | loss`.

train: tokens a second and MFU of training steps (1024 tokens, bfloat16, fused AdamW) for each strategy, the sequential hybrid
and a LLaMA of as many parameters, layers compiled; beside each FAC's ratio to it and what the FLOPs predict. Our
goals at 350M: 93 % of the predicted ratio. The paper, 65k tokens of vocabulary: FAC 1.68x no split at 350M, 1.83x at 1B.

blocks: the same without embeddings and head, forward and backward. Our goal: FAC 1.80x no split.

peers: training steps of transformers' Falcon-H1 and Jamba classes as pip installs them (their torch paths), beside FAC; nothing
is compiled.

profile: where the GPU's time goes in FAC's blocks, forward and backward. Our goal: moving tokens at most 3 %.

decode: milliseconds a token behind 8192 tokens, beside the LLaMA; nothing is compiled or captured.

loss: the strategies at equal tokens of a real text: validation loss. The paper's 1B accuracies: no split 42.95, AE 40.17, FA
38.50, FAC 41.97, sequential 42.06.

MFU has one definition: three times the forward's FLOPs (_hybrids.forward_flops) over the card's dense bfloat16 peak.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from benchmarks.claims import _hybrids as hybrids
from benchmarks.claims import _sharing as sharing
from effcore.methods.flowhn import block_flops

LENGTH = 1024


def _peak() -> float | None:
    name = torch.cuda.get_device_name() if sharing.CUDA else ""
    return next((peak for card, peak in hybrids.HALF_PRECISION_PEAK.items() if card in name), None)


def _compiled(model: Any) -> Any:
    if sharing.CUDA:
        for layer in hybrids.layers_of(model):
            layer.compile(dynamic=False)  # a size a strategy: none of them changes
    return model


def _make(name: str, size: str, length: int) -> Any:
    torch.manual_seed(0)
    strategy = next((s for s, shown in hybrids.STRATEGIES.items() if shown == name), None)
    make = hybrids.flowhn if strategy else hybrids.other
    return make(strategy or name, size, length, sharing.DEVICE, sharing.DTYPE)


def _rows(
    steps: dict[str, Any], flops: dict[str, float], tokens: int, texts: int, rounds: int, **more: Any
) -> list[dict]:
    """Measures the steps in turns; FAC's ratio to each, with the ratio of their FLOPs (forward, of one text)."""
    times = sharing.in_turns(steps, rounds=rounds, repeats=3)
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
            step = sharing.Training(_compiled(model) if compiled else model, batch, length)
            step()
            sharing.synchronize()
        except Exception as error:  # one model that does not run here must not hide the others
            print(f"  {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        steps[name] = step
    rows = _rows(steps, flops, batch * length, batch, rounds, size=size, length=length, batch=batch, **more)
    for row in rows:
        row["parameters"] = counts[row["model"]]
    return rows


def train(size: str, batch: int, length: int, rounds: int) -> list[dict]:
    print(f"training, {size}, {batch} texts of {length} tokens", flush=True)
    return _training([*hybrids.STRATEGIES.values(), "LLaMA"], size, batch, length, rounds, compiled=True, what="train")


def peers(size: str, batch: int, length: int, rounds: int) -> list[dict]:
    print(f"training beside transformers' hybrids as installed, {size}, {batch} texts of {length} tokens", flush=True)
    rows: list[dict] = []
    for name in ("Falcon-H1 (transformers)", "Jamba (transformers)"):
        rows += _training([hybrids.STRATEGIES["fac"], name], size, batch, length, rounds, compiled=False, what="peers")
        sharing.free()
    return rows


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


def blocks(size: str, batch: int, length: int, rounds: int) -> list[dict]:
    print(f"blocks alone, forward and backward, {size}, {batch} texts of {length} tokens", flush=True)
    steps, flops = {}, {}
    for name in hybrids.STRATEGIES.values():
        model = _compiled(_make(name, size, length)).train()
        steps[name] = _Blocks(model, batch, length)
        flops[name] = model.config.num_hidden_layers * block_flops(model.config)
    return _rows(steps, flops, batch * length, batch, rounds, size=size, length=length, batch=batch, what="blocks")


KINDS = {
    "moving tokens": ("routing::",),
    "scan": ("scan::",),
    "attention": ("attention",),
    "products": ("gemm", "nvjet", "cutlass"),
}


def profile(size: str, batch: int, length: int) -> list[dict]:
    """Shares of the GPU's time, kernels sorted by their names; the rest are norms, gates and sums."""
    print(f"where the time of FAC's blocks goes, {size}, {batch} texts of {length} tokens", flush=True)
    step = _Blocks(_compiled(_make(hybrids.STRATEGIES["fac"], size, length)).train(), batch, length)
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
    rows = []
    for kind, microseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind:<16} {microseconds / 3e3:9.2f} ms {microseconds / total:6.1%}", flush=True)
        row = {"what": "profile", "size": size, "batch": batch, "length": length, "kind": kind}
        rows.append(row | {"ms": microseconds / 3e3, "share": microseconds / total})
    return rows


@torch.no_grad()
def decode(size: str, batch: int, length: int) -> list[dict]:
    """Milliseconds of each of 64 steps behind ``length`` tokens: the median, and the slowest but one."""
    print(f"decoding behind {length} tokens, {size}, {batch} rows", flush=True)
    rows = []
    for name in (hybrids.STRATEGIES["fac"], "LLaMA"):
        model = _make(name, size, LENGTH).eval()
        ids = torch.randint(0, model.config.vocab_size, (batch, length), device=sharing.DEVICE)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        seconds = []
        for _ in range(72):
            sharing.synchronize()
            begin = time.perf_counter()
            cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
            sharing.synchronize()
            seconds.append(time.perf_counter() - begin)
        steps = sorted(1e3 * s for s in seconds[8:])
        row = {"what": "decode", "size": size, "batch": batch, "context": length, "model": name}
        rows.append(row | {"ms": statistics.median(steps), "slowest_ms": steps[-2]})
        print(f"  {name:<26} {rows[-1]['ms']:8.2f} ms a token, slowest {rows[-1]['slowest_ms']:.2f}", flush=True)
        del model, cache
        sharing.free()
    return rows


def loss(size: str, batch: int, length: int, steps: int) -> list[dict]:
    """AdamW as in the paper: 3e-4, betas 0.9 and 0.95, decay 0.1, 10 % warm-up, cosine."""
    from effcore.data import PackedTokens, byte_tokenizer, load_corpus

    tokenizer = byte_tokenizer()
    corpus = load_corpus(None, tokenizer)
    held = PackedTokens(corpus.validation, length)
    held_out = torch.stack([torch.as_tensor(held[i]["input_ids"]) for i in range(min(len(held), 8 * batch))])
    windows = PackedTokens(corpus.train, length, samples=steps * batch, seed=0)
    print(f"validation loss after {steps} steps of {batch} x {length} bytes of {corpus.name}, {size}", flush=True)
    rows = []
    for strategy, name in hybrids.STRATEGIES.items():
        torch.manual_seed(0)
        model = hybrids.flowhn(strategy, size, length, sharing.DEVICE, torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=sharing.CUDA
        )
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, max(steps // 10, 1))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [max(steps // 10, 1)])
        begin = time.perf_counter()
        model.train()
        for i in range(steps):
            rows_ = [torch.as_tensor(windows[i * batch + j]["input_ids"]) for j in range(batch)]
            ids = torch.stack(rows_).to(sharing.DEVICE)
            with torch.autocast(sharing.DEVICE, torch.bfloat16, enabled=sharing.CUDA):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        seconds = time.perf_counter() - begin
        model.eval()
        with torch.no_grad(), torch.autocast(sharing.DEVICE, torch.bfloat16, enabled=sharing.CUDA):
            losses = [
                model(input_ids=part.to(sharing.DEVICE), labels=part.to(sharing.DEVICE), use_cache=False).loss.item()
                for part in held_out.split(batch)
            ]
        row = {"what": "loss", "size": size, "steps": steps, "batch": batch, "length": length, "model": name}
        row |= {"tokens": steps * batch * length, "validation_loss": statistics.mean(losses), "seconds": seconds}
        print(f"  {name:<26} {row['validation_loss']:.4f} nats a byte, {seconds:.0f} s", flush=True)
        rows.append(row)
        del model, optimizer, schedule, warm_up, cosine
        sharing.free()
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = sharing.arguments("flowhn", __doc__ or "", ("train", "blocks", "peers", "profile", "decode", "loss"))
    parser.add_argument("--size", default="350M", help="135M, 350M or 1B")
    parser.add_argument("--batch", type=int, default=32, help="texts a step")
    parser.add_argument("--steps", type=int, default=300, help="of a training (loss)")
    options = parser.parse_args(arguments)
    size, batch, length = ("toy", 2, 64) if options.quick else (options.size, options.batch, LENGTH)
    context = length if options.quick else 8192
    rows = {
        "train": lambda: train(size, batch, length, options.rounds),
        "blocks": lambda: blocks(size, batch, length, options.rounds),
        "peers": lambda: peers(size, batch, length, options.rounds),
        "profile": lambda: profile(size, batch, length),
        "decode": lambda: decode(size, batch, context),
        "loss": lambda: loss(size, batch, length, 4 if options.quick else options.steps),
    }[options.claim]()
    sharing.Report(options.json, f"flowhn {options.claim}").add(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
