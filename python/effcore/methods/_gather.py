"""The few collectives that a draw over several processes needs; one process, or no torch.distributed, costs nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of the default group, asked for at each use: a sampler may be made before they are."""

    @property
    def count(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.count > 1 else 0

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def maximum(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.count == 1:
            return value
        held = torch.tensor(value, device=self._device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return int(held)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first process's tensor: processors that round differently must not draw differently."""
        if self.count == 1:
            return tensor
        held = tensor.to(self._device)
        dist.broadcast(held, src=0)
        return held.cpu()

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor [n, ...] of all processes behind one another, in the order of ranks; n may differ."""
        most = self.maximum(len(tensors[0]))
        sizes = [torch.zeros((), dtype=torch.int64, device=self._device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor(len(tensors[0]), device=self._device))
        gathered = []
        for tensor in tensors:
            padded = tensor.new_zeros((most, *tensor.shape[1:]), device=self._device)
            padded[: len(tensor)] = tensor.to(self._device)
            parts = [torch.empty_like(padded) for _ in range(self.count)]
            dist.all_gather(parts, padded)
            gathered.append(torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)]).cpu())
        return gathered
