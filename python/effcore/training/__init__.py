"""Training runs: a recipe in, a run folder out (checkpoints, metrics.jsonl, report.md, plots). See :mod:`effcore.training.run`."""
