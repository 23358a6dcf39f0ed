"""``effcore bench``: hands over to the benchmark runner of a checkout."""

from __future__ import annotations

from typing import Annotated

import typer


def bench(
    family: Annotated[str, typer.Argument(help="The family of ops to measure.")] = "attention",
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda.")] = None,
    json_: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write the results to this file.")
    ] = None,
) -> None:
    """Speed of the ops against the best peers on this machine (runs benchmarks/ of a source checkout)."""
    import importlib.util
    import subprocess
    import sys
    from pathlib import Path

    import effcore
    from effcore.errors import InputError, RunError, nearest

    roots = [Path.cwd(), *(Path(path).resolve().parents[1] for path in effcore.__path__)]
    root = next((root for root in roots if (root / "benchmarks" / "run.py").is_file()), None)
    if root is None:
        raise RunError(
            "the benchmarks are part of the source checkout, not of the installed package: "
            "clone the repository and run this command, or python -m benchmarks.run, in its root"
        )
    families = sorted(path.stem.removeprefix("bench_") for path in (root / "benchmarks" / "ops").glob("bench_*.py"))
    if families and family not in families:
        raise InputError(f"no benchmark of {family!r}{nearest(family, families)} (there are: {', '.join(families)})")
    if importlib.util.find_spec("torch") is None:
        raise RunError("the benchmarks need torch, which is not installed")
    options = [*(["--device", device] if device else []), *(["--json", str(Path(json_).absolute())] if json_ else [])]
    code = subprocess.run([sys.executable, "-m", "benchmarks.run", family, *options], cwd=root, check=False).returncode
    if code:
        raise typer.Exit(code)
