"""Which tokens of a pass each branch of a block takes.

A pass has rows of new tokens at positions of their own. Where all rows are alike the tokens stay [B, L]; where they are not
(left padding, rows that were continued differently) they are packed in one row, without padding, and offsets tell the rows
apart. Everything here is known on the host: no pass waits for the device to learn its routes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcore.methods.flowhn import attention_table
from effcore.models.flowhn_config import FlowHNConfig

REMEMBERED = 1 << 20  # tokens of passes whose routes are kept, 8 bytes each in every block, or those of one longer pass


class Part:
    """The tokens of one branch. A plain object: FSDP2 leaves it alone.

    Attributes:
        counts: tokens of each row.
        offsets: int32 [rows + 1] where the rows are packed, else None.
        rows: int64 [K], the row of each token, where packed.
    """

    __slots__ = ("counts", "offsets", "rows")

    def __init__(self, counts: list[int], offsets: Tensor | None = None, rows: Tensor | None = None):
        self.counts, self.offsets, self.rows = counts, offsets, rows

    @property
    def packed(self) -> bool:
        return self.offsets is not None

    @property
    def empty(self) -> bool:
        return not any(self.counts)


class Route:
    """Both parts of a block.

    Attributes:
        order: int32 [tokens of the pass]: attention's tokens, row after row, then the SSM's. None where no token moves: both
            branches take all of them, or one does and the other's part is empty.
        inverse: the place of each token in ``order``.
    """

    __slots__ = ("attention", "inverse", "order", "ssm")

    def __init__(self, attention: Part, ssm: Part, order: Tensor | None = None, inverse: Tensor | None = None):
        self.attention, self.ssm, self.order, self.inverse = attention, ssm, order, inverse

    @classmethod
    def of(cls, chosen: Tensor, attention: Part, ssm: Part, device: torch.device) -> Route:
        """``chosen``: bool [tokens of the pass], on the host: those that attention takes."""
        if attention.empty or ssm.empty:
            return cls(attention, ssm)
        order = torch.cat([chosen.nonzero(), (~chosen).nonzero()]).flatten()
        return cls(attention, ssm, *(t.to(device, torch.int32) for t in (order, order.argsort())))


class Router:
    """Makes the routes of a pass, and remembers those of passes that were alike.

    Args:
        config: its strategy, routing length and split.
    """

    def __init__(self, config: FlowHNConfig):
        self.length, self.blocks = config.routing_length, config.num_hidden_layers
        self.split = config.strategy in ("ae", "fa", "fac")
        n = config.split
        self.tables = (
            [attention_table(config.strategy, self.length, n, i) for i in range(self.blocks)] if self.split else []
        )
        self._paths = list(zip(*(t.tolist() for t in self.tables), strict=True))
        self._uniform: dict[tuple[int, int, int, torch.device], list[Route]] = {}
        self._remembered = 0

    def path(self, position: int) -> tuple[bool, ...]:
        """Of each block, whether the token at this position meets attention there; it meets the SSM elsewhere (or as well)."""
        return self._paths[position % self.length] if self.split else (True,) * self.blocks

    def attended(self, tokens: int) -> int:
        """How many of a row's first ``tokens`` tokens attention takes, in the block where it takes most."""
        if not self.split:
            return tokens
        whole, rest = divmod(tokens, self.length)
        return max((whole * int(t.sum()) + int(t[:rest].sum()) for t in self.tables), default=0)

    def uniform(self, batch: int, start: int, tokens: int, device: torch.device) -> list[Route]:
        """Routes of [batch, tokens] at positions from ``start`` on, for each block."""
        if not self.split:
            whole = Part([tokens] * batch)
            return [Route(whole, whole)] * self.blocks
        key = (batch, start % self.length, tokens, device)
        if key not in self._uniform:
            self._remembered += batch * tokens
            if self._remembered > REMEMBERED or len(self._uniform) >= 4096:
                self._uniform.clear()
                self._remembered = batch * tokens
            positions = (torch.arange(tokens, device="cpu") + start) % self.length
            self._uniform[key] = []
            for table in self.tables:
                chosen = table[positions]
                n = int(chosen.sum())
                parts = Part([n] * batch), Part([tokens - n] * batch)
                self._uniform[key].append(Route.of(chosen.repeat(batch), *parts, device))
        return self._uniform[key]

    def packed(self, starts: list[int], counts: list[int], device: torch.device) -> list[Route]:
        """Routes of rows packed one after another: ``counts[b]`` tokens at positions from ``starts[b]`` on."""
        positions = (
            torch.cat([torch.arange(s, s + n, device="cpu") for s, n in zip(starts, counts, strict=True)]) % self.length
        )
        rows = torch.arange(len(counts), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))

        def part(own: Tensor) -> Part:
            sizes = torch.bincount(own, minlength=len(counts))
            offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(device, torch.int32)
            return Part(sizes.tolist(), offsets, own.to(device))

        if not self.split:
            whole = part(rows)
            return [Route(whole, whole)] * self.blocks
        chosen = [table[positions] for table in self.tables]
        return [Route.of(c, part(rows[c]), part(rows[~c]), device) for c in chosen]
