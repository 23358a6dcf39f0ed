"""How long a posterior over all experts of a model of 1 billion parameters takes to fit, and in which memory:
`python -m benchmarks.claims.bayesian_moe_fit [--quick] --json FILE`.

The peer does what Laplace libraries do with a model whose experts are linear layers: hooks on each expert's second layer add up
its two Kronecker factors in float32, expert by expert, and each factor is decomposed at the end (timed for one layer, since the
layers are equal). It runs on the same weights
(views of the stacked ones). Both take the exact Fisher matrix over the same answers, from the same batches.

Goal: ours, of rank 10, at least ten times as fast, in memory that grows with the rank and not with the square of the width.
"""

from __future__ import annotations

import argparse
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
        return hf.Qwen2MoeForCausalLM(config).to(dtype).eval()


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


def loop(model: Any, batches: list[Batch]) -> list[Factors]:
    """The peer's sums; its hooks stay on the model."""
    factors = []
    for layer in model.model.layers:
        layer.mlp.experts = LoopedExperts(layer.mlp.experts)
        factors += [Factors(down) for down in layer.mlp.experts.down]
    model.requires_grad_(False)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.bayesian_moe_fit", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=704, help="width of an expert")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that it runs; not the claim")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.inner, options.layers, options.batches, options.batch = 128, 64, 1, 2, 2
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    model = make_model(options.width, options.inner, options.layers, options.device, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters, {options.device}, {dtype}", flush=True)
    batches = [
        {"input_ids": torch.randint(100, 32_000, (options.batch, options.length), device=options.device)}
        for _ in range(options.batches)
    ]
    results: dict[str, Any] = {}

    def record(name: str, run: Callable[[], Any]) -> Any:
        seconds, peak, result = measured(run, options.device)
        results[name] = {"seconds": seconds, "peak_bytes": peak, "kept_bytes": kept_bytes(result)}
        kept = results[name]["kept_bytes"]
        print(f"{name:26s} {seconds:8.2f} s   peak {peak / 2**30:6.2f} GiB   kept {kept / 2**30:6.3f} GiB", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            settings = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
            report = {"claim": "bayesian_moe_fit", "parameters": parameters, "torch": torch.__version__}
            options.json.write_text(json.dumps(report | {"settings": settings, "results": results}, indent=1))
        return result

    def ours(count: int, **settings: Any) -> Any:
        return laplace(model, batches[:count], answers=ANSWERS, **settings)

    ours(1, rank=10)  # libraries load, handles are made
    record("ours, rank 10", lambda: ours(len(batches), rank=10))
    record("ours, rank 20", lambda: ours(len(batches), rank=20))
    factors = record("loop: sums", lambda: loop(model, batches))
    record("loop: eigh of a layer", lambda: decomposed(factors[: len(factors) // options.layers]))
    seconds = {name: result["seconds"] for name, result in results.items()}
    whole = seconds["loop: sums"] + options.layers * seconds["loop: eigh of a layer"]
    print(f"the loop takes {whole / seconds['ours, rank 10']:.1f} times as long as rank 10 (goal 10), "
          f"{seconds['loop: sums'] / seconds['ours, rank 10']:.1f} times for its sums alone")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
