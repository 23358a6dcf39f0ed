"""A linear layer of two thin factors, as a formula in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}[activation](x)


def lowrank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """f(x downᵀ upᵀ + bias)"""
    return activate(F.linear(F.linear(x, down), up, bias), activation)
