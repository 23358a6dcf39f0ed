"""The same functions as :mod:`effcore.ops`, slow and obvious, in plain torch: the oracle of every test."""

from effcore._lazy import submodules

__getattr__ = submodules(__name__)
