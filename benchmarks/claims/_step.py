"""A whole optimizer step as one call: on CUDA one graph, so that small models are not bound by launching kernels."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Forward = Callable[[Inputs], tuple[Tensor, Tensor]]


class TrainStep:
    """``step(inputs, lr) -> (loss, outputs)``: forward, backward, clipping at 1, AdamW.

    Not for several at once: graphs captured in one process share cuBLAS's workspace of the stream they were captured on.

    Args:
        forward: inputs -> (loss, outputs).
        example: inputs whose shapes are captured; others (the last batch of an epoch) run eagerly.
    """

    def __init__(self, model: nn.Module, forward: Forward, example: Inputs, *, weight_decay: float = 0.01):
        self.model, self.forward = model, forward
        self.cuda = next(model.parameters()).is_cuda
        self.lr = torch.tensor(0.0, device=next(model.parameters()).device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.lr if self.cuda else 0.0,
            weight_decay=weight_decay,
            fused=True,
            capturable=self.cuda,
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static = {name: tensor.clone() for name, tensor in example.items()}
        if self.cuda:
            self._capture()
        else:
            self._eager(self.static)  # makes the moments; its learning rate is 0
        for tensor in self.moments():
            tensor.zero_()

    def __call__(self, inputs: Inputs, lr: float) -> tuple[Tensor, Tensor]:
        self.lr.fill_(lr)
        if not self.cuda:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        if self.graph is None or any(inputs[name].shape != t.shape for name, t in self.static.items()):
            return self._eager(inputs)
        for name, tensor in self.static.items():
            tensor.copy_(inputs[name])
        self.graph.replay()
        return self.result

    def reset(self, weights: Mapping[str, Tensor]) -> None:
        """Another run from the beginning: these weights, and no moments. What was compiled and captured serves it too."""
        self.model.load_state_dict(weights)
        for tensor in self.moments():
            tensor.zero_()

    def moments(self) -> list[Tensor]:
        """AdamW's moments and counts, as they stand in the step."""
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()]

    def set_moments(self, moments: Sequence[Tensor]) -> None:
        """Goes on from what :meth:`moments` gave of a step of the same model."""
        for tensor, value in zip(self.moments(), moments, strict=True):
            tensor.copy_(value)

    def _eager(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        loss, outputs = self.forward(inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach(), outputs.detach()

    def _capture(self) -> None:
        """The steps that warm up have a learning rate of 0: they change nothing but the moments."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._eager(self.static)
            torch.cuda.current_stream().wait_stream(side)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = self._eager(self.static)
            self.graph = graph
        except RuntimeError as error:
            print(f"no CUDA graph ({str(error).splitlines()[0]}): eager steps", file=sys.stderr)


def linear_decay(step: int, total: int, *, peak: float, warmup: float = 0.05) -> float:
    """Linear warm-up, then linear decay to 0."""
    first = max(math.ceil(warmup * total), 1)
    return peak * min((step + 1) / first, (total - step) / max(total - first, 1))
