"""Training runs: a recipe in, a run folder out. :mod:`effcore.training.run` does it, :mod:`effcore.training.folder` says what
the folder holds."""

from effcore._lazy import submodules

__getattr__ = submodules(__name__)
