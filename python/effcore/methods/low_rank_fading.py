"""What a decomposition cuts off, fading beside the factors: f(x) + share · (W − Ŵ) x, the share falling from one to nothing.

Where the share is one this is the layer as it was, so that training goes on from its loss and not from the truncation's. The
factors train all along and stay the same parameters; the rest is frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effcore.methods.low_rank_layers import replace
from effcore.nn.low_rank import LowRankConv2d, LowRankLinear


class Fading(nn.Module):
    """x -> layer(x) + share · rest(x).

    Args:
        layer: the factors.
        rest: of the same shape as the layer before, without a bias of its own.
    """

    share: Tensor

    def __init__(self, layer: LowRankLinear | LowRankConv2d, rest: nn.Module):
        super().__init__()
        self.layer, self.rest = layer, rest.requires_grad_(False)
        self.register_buffer("share", torch.ones((), device=layer.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out + self.share.to(out.dtype) * self.rest(x)


@torch.no_grad()
def _rest(before: nn.Module, layer: LowRankLinear | LowRankConv2d) -> nn.Module:
    if isinstance(before, LowRankLinear):
        weight = before.weight - layer.weight
        rest: nn.Module = nn.Linear(before.in_features, before.out_features, False, device="meta")
        rest.weight = nn.Parameter(weight)
        return rest
    rest = copy.deepcopy(before)
    assert isinstance(rest.weight, Tensor)
    approximation = layer.weight
    rest.weight.sub_(approximation.T if type(rest).__name__ == "Conv1D" else approximation)
    if isinstance(rest.bias, Tensor):  # the factors have it
        rest.bias.zero_()
    return rest


def fade(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Puts back, to fade, what layers lost that are low-rank now and were something else before.

    Args:
        before: the model's modules by name, as they were.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRankLinear | LowRankConv2d) and before.get(name) is not layer:
            replace(model, name, Fading(layer, _rest(before[name], layer)))


def set_share(model: nn.Module, share: float) -> None:
    """In place: what was captured or compiled sees it."""
    for module in model.modules():
        if isinstance(module, Fading):
            module.share.fill_(share)


def settle(model: nn.Module) -> None:
    """The factors alone, whatever has not faded yet."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Fading):
            replace(model, name, module.layer)
