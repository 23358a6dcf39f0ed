"""The ``effcore`` command: its tree, and what errors become.

Exit codes: 0 done · 1 failed (one line says why) · 2 wrong input (one line says what) · 130 interrupted with Ctrl-C.
Commands import what they need when they run.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

import effcore
from effcore.cli import adapt, bench, calibrate, compare, compress, demo, doctor, generate, plan, train
from effcore.errors import InputError, RunError, memory_is_full

app = typer.Typer(
    name="effcore",
    help="Train and run neural networks with less compute: published methods as native ops, modules and commands.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"effcore {effcore.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.add_typer(train.app, name="train")
app.add_typer(plan.app, name="plan")
app.command(name="compare")(compare.compare)
app.command(name="generate")(generate.generate)
app.command(name="adapt")(adapt.adapt)
app.command(name="compress")(compress.compress)
app.command(name="calibrate")(calibrate.calibrate)
app.command(name="doctor")(doctor.doctor)
app.command(name="bench")(bench.bench)
app.command(name="demo")(demo.demo)


def run(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits."""
    try:
        app(args=arguments)
    except InputError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except BrokenPipeError:  # the reader of a pipe has gone: | head
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        reason = error.strerror or error
        _fail(f"{error.filename}: {reason}" if error.filename else reason, 1)
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        _fail("out of memory: a smaller model, batch or length needs less", 1)
    except (KeyboardInterrupt, SystemExit) as ended:
        interruption = _interruption(ended)  # typer makes of Ctrl-C a silent exit
        if interruption is None:
            raise
        _fail("; ".join(["interrupted", *getattr(interruption, "__notes__", [])]), 130)
    sys.exit(0)


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that an exception comes from; its notes say how to go on."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def _fail(message: object, code: int) -> NoReturn:
    print(f"effcore: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)
