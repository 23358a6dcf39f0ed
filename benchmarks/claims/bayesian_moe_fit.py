"""How long a posterior over all experts of a model of 1 billion parameters takes to fit, and in which memory:
`python -m benchmarks.claims.bayesian_moe_fit [--quick] --json FILE`.

The peer does what Laplace libraries do with a model whose experts are linear layers: hooks on each expert's second layer add up
its two Kronecker factors in float32, expert by expert, and each factor is decomposed at the end. It runs on the same weights
(views of the stacked ones). Both take the exact Fisher matrix over the same answers, from the same batches.

Three parts, of which --parts chooses some:
- small: a model of two layers, both ways measured from beginning to end;
- full: the model of 1 billion parameters. Of the peer --peer-batches batches and the factors of --peer-experts experts of one
  layer are timed where that is less than all, and scaled up: its work is the same for each batch, expert and layer;
- memory: what is held at the peak beyond the model, for one batch, against the rank, and with full factors (hessian="kron").

Goal: ours, of rank 10, at least ten times as fast, in memory that grows with the rank and not with the square of the width.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcore.methods.bayesian_moe import laplace

Batch = dict[str, Tensor]
ANSWERS = [11, 12, 13, 14]


def make_model(width: int, inner: int, layers: int, device: str, dtype: torch.dtype) -> Any:
    """A Qwen2-MoE with 60 experts, 4 of them for each token, as Qwen1.5-MoE has, with random weights."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Qwen2MoeConfig(
        vocab_size=32_000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=inner,
        intermediate_size=4 * inner, shared_expert_intermediate_size=4 * inner, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model: Any = hf.Qwen2MoeForCausalLM(config)
    return model.to(dtype).eval()


class LoopedExperts(nn.Module):
    """A layer's experts as linear layers, one after the other."""

    def __init__(self, stacked: Any):
        super().__init__()
        self.act_fn = stacked.act_fn
        self.gate_up = nn.ModuleList(map(_linear, stacked.gate_up_proj.detach()))
        self.down = nn.ModuleList(map(_linear, stacked.down_proj.detach()))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, slot = (top_k_index == e).nonzero(as_tuple=True)
            gate, up = gate_up(hidden_states[token]).chunk(2, -1)
            y = down(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Factors:
    """The factors of one linear layer, from hooks."""

    def __init__(self, layer: nn.Linear):
        device = layer.weight.device
        self.a = torch.zeros(layer.in_features, layer.in_features, device=device)
        self.b = torch.zeros(layer.out_features, layer.out_features, device=device)
        layer.register_forward_hook(self.forward)

    def forward(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a = inputs[0].detach().float()
        self.a.addmm_(a.mT, a)
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.register_hook(self.backward)
        return output

    def backward(self, gradient: Tensor) -> None:
        g = gradient.float()
        self.b.addmm_(g.mT, g)


def with_hooks(model: Any) -> list[Factors]:
    """The peer's model, in place."""
    factors = []
    for layer in model.model.layers:
        layer.mlp.experts = LoopedExperts(layer.mlp.experts)
        factors += [Factors(down) for down in layer.mlp.experts.down]
    model.requires_grad_(False)
    return factors


def loop(model: Any, batches: list[Batch], factors: list[Factors]) -> list[Factors]:
    """The peer's sums."""
    for batch in batches:
        logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1, ANSWERS].float()
        p = logits.detach().softmax(-1)
        for c in range(len(ANSWERS)):
            residual = p - torch.nn.functional.one_hot(torch.tensor(c, device=p.device), len(ANSWERS))
            logits.backward(p[:, c, None].sqrt() * residual, retain_graph=c + 1 < len(ANSWERS))
    return factors


def decomposed(factors: list[Factors]) -> list[tuple[Any, Any]]:
    """What predictions need of the peer's sums."""
    return [(torch.linalg.eigh(f.a), torch.linalg.eigh(f.b)) for f in factors]


def measured(run: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Seconds, bytes beyond what was there before at the peak, result."""
    cuda = device.startswith("cuda")
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if cuda else float("nan"), result


def kept_bytes(result: Any) -> int:
    if hasattr(result, "layers"):
        return sum(t.nbytes for layer in result.layers for factor in layer.factors for t in factor)
    if isinstance(result[0], Factors):
        return sum(f.a.nbytes + f.b.nbytes for f in result)
    return sum(t.nbytes for pair in result for decomposition in pair for t in decomposition)


class Report:
    """What was measured, on the screen and in the file as it comes."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.parts: dict[str, dict[str, Any]] = {}

    def measure(self, part: str, name: str, run: Callable[[], Any]) -> tuple[float, Any]:
        seconds, peak, result = measured(run, self.options.device)
        kept = kept_bytes(result)
        print(f"{part:7s} {name:28s} {seconds:8.3f} s   peak {peak / 2**20:8.0f} MiB   kept {kept / 2**20:8.1f} MiB",
              flush=True)  # fmt: skip
        self.add(part, name, {"seconds": seconds, "peak_bytes": peak, "kept_bytes": kept})
        return seconds, result

    def add(self, part: str, name: str, value: Any) -> None:
        self.parts.setdefault(part, {})[name] = value
        if self.options.json:
            settings = {k: v for k, v in vars(self.options).items() if not isinstance(v, Path)}
            device = torch.cuda.get_device_name() if self.options.device.startswith("cuda") else "cpu"
            report = {"claim": "bayesian_moe_fit", "torch": torch.__version__, "device": device, "settings": settings}
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(json.dumps(report | {"parts": self.parts}, indent=1))


def compare(report: Report, part: str, shape: tuple[int, int, int], peer_batches: int, peer_experts: int) -> None:
    """Ours and the loop on a model of this (width, inner width, layers)."""
    options = report.options
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    model = make_model(*shape, options.device, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{part}: {parameters / 1e9:.2f} billion parameters, {dtype}", flush=True)
    report.add(part, "parameters", parameters)
    batches = make_batches(options, options.batches)
    laplace(model, batches[:1], answers=ANSWERS, rank=10)  # libraries load, handles are made
    ours, _ = report.measure(part, "ours, rank 10", lambda: laplace(model, batches, answers=ANSWERS, rank=10))
    report.measure(part, "ours, rank 20", lambda: laplace(model, batches, answers=ANSWERS, rank=20))
    few = min(peer_batches, len(batches))
    hooked = with_hooks(model)
    loop(model, batches[:1], hooked)  # sums of this one stay: their values do not matter
    sums, factors = report.measure(part, f"loop: sums, {few} batches", lambda: loop(model, batches[:few], hooked))
    some = factors[: min(peer_experts, len(factors))]
    decomposed(some[:1])
    parts, _ = report.measure(part, f"loop: eigh, {len(some)} experts", lambda: decomposed(some))
    sums, parts = sums * len(batches) / few, parts * len(factors) / len(some)
    how = "measured" if few == len(batches) and len(some) == len(factors) else "scaled up"
    print(f"{part}: the loop takes {sums:.2f} s for its sums and {parts:.2f} s for eigh ({how}): {(sums + parts) / ours:.1f} "
          f"times as long as rank 10 (goal 10), {sums / ours:.2f} times for its sums alone", flush=True)  # fmt: skip
    report.add(part, "ratio", {"whole": (sums + parts) / ours, "sums": sums / ours, "loop": how})


def memory(report: Report) -> None:
    """Of one batch, by rank and width; the width of experts goes along."""
    options = report.options
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    for width in (options.width // 2, options.width):
        model = make_model(width, options.inner * width // options.width, 2, options.device, dtype)
        batches = make_batches(options, 1)
        kinds: dict[str, dict[str, Any]] = {f"rank {k}": {"rank": k} for k in (10, 20, 40)} | {
            "kron": {"hessian": "kron"}
        }
        for name, settings in kinds.items():
            fit = functools.partial(laplace, model, batches, answers=ANSWERS, **settings)
            fit()
            report.measure("memory", f"width {width}, {name}", fit)


def make_batches(options: argparse.Namespace, count: int) -> list[Batch]:
    size = (options.batch, options.length)
    return [{"input_ids": torch.randint(100, 32_000, size, device=options.device)} for _ in range(count)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.bayesian_moe_fit", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="*", default=["small", "full", "memory"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=704, help="width of an expert")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--peer-batches", type=int, default=2)
    parser.add_argument("--peer-experts", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that it runs; not the claim")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.inner, options.layers, options.batches, options.batch = 128, 64, 2, 2, 2
    report = Report(options)
    everything = 1 << 30
    if "small" in options.parts:
        compare(report, "small", (options.width // 2, options.inner // 2, 2), everything, everything)
    if "full" in options.parts:
        compare(
            report, "full", (options.width, options.inner, options.layers), options.peer_batches, options.peer_experts
        )
    if "memory" in options.parts:
        memory(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
