"""Training runs: a recipe in, a run folder out. :mod:`effcore.training.run` does it, :mod:`effcore.training.folder` says what
the folder holds."""
