"""Which layer computes its own attention activations, and which layer uses those of another: one owner index per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The sharing layout of a decoder: layer ``i`` uses the activations of layer ``owners[i]``.

    A layer with ``owners[i] == i`` computes its own Q and K (mode ``qk``) or K and V (mode ``kv``); every other layer is a
    *consumer* of an earlier layer that owns. Written as a string, one owner per layer: ``"0_1_2_2_2_2"``.

    Raises:
        ValueError: a layout without layers, an owner that is not a layer, that comes after its consumer, or that is itself
            a consumer.
    """

    owners: tuple[int, ...]

    def __post_init__(self) -> None:
        owners = tuple(self.owners)
        object.__setattr__(self, "owners", owners)
        if not owners:
            raise ValueError("effcore.Layout: a layout needs at least one layer, got none")
        for layer, owner in enumerate(owners):
            if isinstance(owner, bool) or not isinstance(owner, int):
                raise ValueError(f"effcore.Layout: the owner of layer {layer} must be a layer index, got {owner!r}")
            if owner < 0:
                raise ValueError(f"effcore.Layout: the owner of layer {layer} must not be negative, got {owner}")
            if owner > layer:
                raise ValueError(
                    f"effcore.Layout: layer {layer} points forward to layer {owner}; it can only use an earlier layer's"
                )
            if owners[owner] != owner:
                raise ValueError(
                    f"effcore.Layout: layer {layer} names layer {owner} as its owner, but that one uses "
                    f"layer {owners[owner]}'s; name layer {owners[owner]}"
                )

    # ---------------------------------------------------------------- construction

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None) -> Layout:
        """Reads ``"0_1_2_2"``; with ``num_layers`` also checks the number of layers."""
        try:
            owners = tuple(int(part) for part in text.strip().split("_"))
        except ValueError:
            raise ValueError(
                f"effcore.Layout: expected one owner index per layer, joined by '_', as in '0_1_2_2_2_2'; got {text!r}"
            ) from None
        layout = cls(owners)
        layout.check_layers(num_layers)
        return layout

    @classmethod
    def full(cls, num_layers: int) -> Layout:
        """Nothing shared: every layer computes its own."""
        return cls(tuple(range(num_layers)))

    @classmethod
    def from_start(cls, num_layers: int, start: int) -> Layout:
        """Layers from ``start`` on use the activations of layer ``start - 1``; ``start = num_layers`` shares nothing."""
        if not 1 <= start <= num_layers:
            hint = " (layer 0 has no layer before it whose activations it could use)" if start == 0 else ""
            raise ValueError(f"effcore.Layout: start must be from 1 to {num_layers}, got {start}{hint}")
        return cls(tuple(min(layer, start - 1) for layer in range(num_layers)))

    @classmethod
    def from_shared(cls, num_layers: int, shared: int) -> Layout:
        """The last ``shared`` layers use the activations of the layer before them (EPAS grows it from the deep end)."""
        if not 0 <= shared < num_layers:
            raise ValueError(f"effcore.Layout: shared must be from 0 to {num_layers - 1}, got {shared}")
        return cls.from_start(num_layers, num_layers - shared)

    @classmethod
    def blockwise(cls, num_layers: int, every: int, start: int = 0) -> Layout:
        """From layer ``start`` on, the first of every ``every`` layers owns and the others of its block use it (CLA)."""
        if every < 1:
            raise ValueError(f"effcore.Layout: every must be at least 1, got {every}")
        if not 0 <= start <= num_layers:
            raise ValueError(f"effcore.Layout: start must be from 0 to {num_layers}, got {start}")
        return cls(tuple(i if i < start else i - (i - start) % every for i in range(num_layers)))

    @classmethod
    def coerce(cls, value: Layout | str | int | Sequence[int], num_layers: int) -> Layout:
        """A layout from whatever names one: a layout, its string, its owners, or a start index."""
        if isinstance(value, Layout):
            layout = value
        elif isinstance(value, str):
            layout = cls.parse(value)
        elif isinstance(value, int):
            return cls.from_start(num_layers, value)
        else:
            layout = cls(tuple(value))
        layout.check_layers(num_layers)
        return layout

    # ---------------------------------------------------------------- questions

    def check_layers(self, num_layers: int | None) -> None:
        """Raises ValueError where the layout is of another number of layers; None fits all."""
        if num_layers is not None and num_layers != self.num_layers:
            raise ValueError(f"effcore.Layout: {self} has {self.num_layers} layers but the model has {num_layers}")

    @property
    def num_layers(self) -> int:
        return len(self.owners)

    @property
    def consumers(self) -> tuple[int, ...]:
        """The layers that use another layer's activations."""
        return tuple(layer for layer, owner in enumerate(self.owners) if owner != layer)

    @property
    def shared(self) -> int:
        """How many layers use another layer's activations."""
        return len(self.consumers)

    @property
    def start(self) -> int:
        """The first consumer; ``num_layers`` where nothing is shared."""
        return self.consumers[0] if self.shared else self.num_layers

    @property
    def is_full(self) -> bool:
        """Whether every layer computes its own."""
        return not self.shared

    @property
    def groups(self) -> dict[int, tuple[int, ...]]:
        """Owner -> its consumers, for the owners that have any."""
        return {owner: c for owner in range(self.num_layers) if (c := self.consumers_of(owner))}

    @property
    def top_owner(self) -> int | None:
        """The one owner that all layers above it use; None where the layout has another form."""
        owner = self.start - 1
        return owner if self.shared and all(o == owner for o in self.owners[self.start :]) else None

    def owner_of(self, layer: int) -> int:
        """The layer whose activations this one uses, itself where it owns."""
        return self.owners[layer]

    def is_consumer(self, layer: int) -> bool:
        """Whether it uses another layer's activations."""
        return self.owners[layer] != layer

    def consumers_of(self, owner: int) -> tuple[int, ...]:
        """The layers that use this one's activations, in ascending order."""
        return tuple(layer for layer in range(owner + 1, self.num_layers) if self.owners[layer] == owner)

    def __len__(self) -> int:
        return len(self.owners)

    def __str__(self) -> str:
        return "_".join(map(str, self.owners))
