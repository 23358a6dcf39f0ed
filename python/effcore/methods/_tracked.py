"""Walking through items while somebody is told how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Progress = Callable[[str, int, int], None]  # of what is done, how many of them, of how many
T = TypeVar("T")


def tracked(items: Sequence[T], what: str, progress: Progress | None) -> Iterator[T]:
    """The items; ``progress(what, done, len(items))`` behind each."""
    for done, item in enumerate(items, 1):
        yield item
        if progress is not None:
            progress(what, done, len(items))
