"""FlowHN: attention and a state-space model side by side, with tokens dealt to them by their cost.

A block runs both branches at once. A split gives each token to one of them: n of a routing chunk's R tokens to attention, so
many that both branches end together, and (FAC) another n in each next block, until every token has met attention. Which branch
a token takes depends on its own position and the block alone: never on what follows, nor on how long the text is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from effcore.ops.routing import circulate, split_tokens

__all__ = [
    "STRATEGIES",
    "BranchCosts",
    "attention_table",
    "attention_tokens",
    "block_flops",
    "branch_costs",
    "calibrate",
    "model_flops",
]

# none: all tokens to both. ae: halves, swapped in each next block. fa: by cost, the same in each block. fac: circulated.
# sequential: all tokens through the SSM, then through attention (no parallel branches; the usual hybrid).
STRATEGIES = ("none", "ae", "fa", "fac", "sequential")


@dataclass(frozen=True)
class BranchCosts:
    """Attention on n tokens costs ``linear · n + quadratic · n²``, the SSM ``ssm`` a token; in FLOPs or microseconds."""

    linear: float
    quadratic: float
    ssm: float

    def attention(self, n: int) -> float:
        """What attention costs on n tokens, in the unit of the costs."""
        return self.linear * n + self.quadratic * n * n

    def split(self, length: int, multiple: int = 1) -> int:
        """The n at which both branches end together, rounded to a multiple where the length has room for some."""
        n = split_tokens(length, attention_cost=(self.linear, self.quadratic), ssm_cost=self.ssm)
        if multiple > 1 and length >= 4 * multiple:
            n = max(multiple, round(n / multiple) * multiple)
        return min(n, length)


def branch_costs(config: Any) -> BranchCosts:
    """FLOPs of a forward pass through both branches of a block, from a configuration alone.

    Twice the parameters that a token meets, the causal half of the two attention products, and the scan at 7 a state.
    """
    d, inner, states = config.hidden_size, config.inner_size, config.state_size
    mlp = 3 * d * config.intermediate_size
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    ssm = 3 * d * inner + inner * (2 * config.dt_rank + 2 * states + config.conv_width)
    return BranchCosts(
        linear=2.0 * (d * heads + mlp),
        quadratic=2.0 * config.head_dim * config.num_attention_heads,
        ssm=2.0 * (ssm + mlp) + 7.0 * inner * states,
    )


def attention_tokens(config: Any) -> int:
    """How many tokens of a routing chunk attention takes."""
    if config.strategy in ("none", "sequential"):
        return config.routing_length
    if config.strategy == "ae":
        return config.routing_length // 2
    if config.attention_tokens is not None:
        return config.attention_tokens
    return branch_costs(config).split(config.routing_length, multiple=16)


def block_flops(config: Any) -> float:
    """FLOPs of a forward pass of one block over a routing chunk, with the projections that bring the branches together."""
    length, costs, n = config.routing_length, branch_costs(config), attention_tokens(config)
    square = 2.0 * config.hidden_size**2 * length
    if config.strategy in ("none", "sequential"):
        whole = costs.attention(length) + costs.ssm * length
        return whole + (3 * square if config.strategy == "none" else 0.0)
    return costs.attention(n) + costs.ssm * (length - n) + 2 * square


def model_flops(config: Any) -> float:
    """FLOPs of a forward pass over a routing chunk: the blocks and the language head."""
    head = 2.0 * config.hidden_size * config.vocab_size * config.routing_length
    return config.num_hidden_layers * block_flops(config) + head


def attention_table(strategy: str, length: int, n: int, block: int) -> torch.Tensor:
    """bool [length]: which positions of a routing chunk attention takes in this block; the SSM takes the others."""
    index, _ = circulate(length, n, 0 if strategy == "fa" else block, device="cpu")
    table = torch.zeros(length, dtype=torch.bool, device="cpu")  # also where a model is made on "meta"
    table[index.long()] = True
    return table


def calibrate(time_attention: Callable[[int], float], time_ssm: Callable[[int], float], length: int) -> BranchCosts:
    """Costs as this device shows them: attention at two lengths gives its linear and quadratic part, the SSM at one.

    Args:
        time_attention, time_ssm: measure a branch on so many tokens of each row.
        length: of a routing chunk.
    """
    half, quarter = max(length // 2, 2), max(length // 4, 1)
    long, short = time_attention(half), time_attention(quarter)
    quadratic = max((long / half - short / quarter) / (half - quarter), 0.0)
    linear = max(long / half - quadratic * half, 0.0)
    return BranchCosts(linear, quadratic, time_ssm(half) / half)
