"""``effcore plan flowhn``: the split of the tokens, what both branches cost, and what a block gains."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def flowhn(
    size: Annotated[str, typer.Option("--size", help="135M, 350M or 1B.")] = "350M",
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of a routing chunk, and of a text.")] = 1024,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Time both branches of a block on this machine as well (bfloat16 on a GPU)."),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts of a measurement.")] = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """FlowHN: how many tokens attention takes, the costs of both branches, and FLOP ratios to the other hybrids."""
    from effcore.errors import InputError
    from effcore.methods.flowhn import block_flops, branch_costs, model_flops
    from effcore.models.flowhn_config import SIZES, FlowHNConfig

    if size not in SIZES:
        raise InputError(f"--size must be one of {', '.join(SIZES)}, got {size}")
    config = FlowHNConfig.of_size(size, routing_length=length)
    costs, n = branch_costs(config), config.split
    whole = {k: FlowHNConfig.of_size(size, routing_length=length, strategy=k) for k in ("none", "sequential")}
    found: dict[str, Any] = {
        "size": size,
        "length": length,
        "attention_tokens": n,
        "ssm_tokens": length - n,
        "attention_gflops": costs.attention(n) / 1e9,
        "ssm_gflops": costs.ssm * (length - n) / 1e9,
        "balance": costs.attention(n) / max(costs.ssm * (length - n), 1.0),
        "flop_ratio": {k: model_flops(c) / model_flops(config) for k, c in whole.items()},
        "block_flop_ratio": {k: block_flops(c) / block_flops(config) for k, c in whole.items()},
    }
    if measure:
        found["measured"] = _measured(config, batch_size)
    if json_:
        print(json.dumps(found))
        return
    print(f"FlowHN {size}, {length} tokens: attention takes {n} of them, the SSM {length - n}")
    print(
        f"  attention {found['attention_gflops']:.2f} GFLOP, SSM {found['ssm_gflops']:.2f} a block and text (forward): "
        f"predicted balance {found['balance']:.2f}"
    )
    for other, name in (("none", "no split"), ("sequential", "one after the other")):
        ratio, block = found["flop_ratio"][other], found["block_flop_ratio"][other]
        print(f"  against {name}: {ratio:.2f}x fewer FLOPs with embeddings and head, {block:.2f}x in a block")
    if measure:
        m = found["measured"]
        print(
            f"  measured: attention {m['attention_ms']:.2f} ms, SSM {m['ssm_ms']:.2f} ms (forward and backward): "
            f"balance {m['balance']:.2f}"
        )
        print(
            f"  balanced by time: {m['attention_tokens']} tokens to attention (attention_tokens={m['attention_tokens']})"
        )


def _measured(config: Any, batch_size: int) -> dict[str, Any]:
    """Forward and backward of both branches of one block at the split, and the split that their times ask for."""
    import statistics
    import time

    import torch

    from effcore.methods.flowhn import calibrate
    from effcore.models.flowhn_block import FlowHNBlock
    from effcore.models.flowhn_routes import Part

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    block: Any = FlowHNBlock(config).to(device, dtype)
    block.ssm.mixer.reset_parameters()

    def milliseconds(branch: Any, n: int) -> float:
        x = torch.randn(batch_size, n, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
        part, seconds = Part([n] * batch_size), []
        for _ in range(5):
            begin = time.perf_counter()
            branch(x, part).sum().backward()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(seconds[1:])

    n, length = config.split, config.routing_length
    costs = calibrate(lambda k: milliseconds(block.attention, k), lambda k: milliseconds(block.ssm, k), length)
    attention, ssm = milliseconds(block.attention, max(n, 1)), milliseconds(block.ssm, max(length - n, 1))
    return {
        "attention_ms": attention,
        "ssm_ms": ssm,
        "balance": attention / ssm,
        "attention_tokens": costs.split(length, multiple=16),
    }
