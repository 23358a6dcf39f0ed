"""``effcore generate``: text from a checkpoint, with any length of the shared region that it was trained for."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from effcore.cli.options import Seed


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, what effcore train or compress wrote, or a GGUF file."),
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to continue; - reads it from standard input.")
    ],
    region: Annotated[
        int | None, typer.Option("--region", min=0, help="How many of the last layers share (up to what was trained).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this much of the probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample from so many tokens; 0 means all.")] = 0,
    seed: Seed = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print prompt, text and speed as JSON.")] = False,
) -> None:
    """Continues a prompt."""
    import sys

    from effcore.errors import InputError

    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # other bytes of a command line become lone surrogates
    except UnicodeError:
        raise InputError("--prompt: the text to continue is not UTF-8") from None
    if not text:
        raise InputError("--prompt: the text to continue is empty")
    from effcore.training.generation import complete

    result: dict[str, Any] = complete(
        model,
        text,
        region=region,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stream=None if json_ else lambda piece: print(piece, end="", flush=True),
    )
    print(json.dumps(result) if json_ else "")
