"""``effcore compress``: a language model by factors of low rank, and what became of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def compress(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a run folder of effcore train, or a GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    ratio: Annotated[float | None, typer.Option("--ratio", help="Each layer's parameters fall by this factor.")] = None,
    error: Annotated[float | None, typer.Option("--error", help="Greatest relative error of a layer.")] = None,
    time: Annotated[float | None, typer.Option("--time", help="The layers' measured time falls to this part.")] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A text file: weights by activations, and layers timed, on its tokens."),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of a batch of the text.")] = 512,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Batches of the text.")] = 8,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Layers to leave, as regular expressions.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result in --out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Decomposes a model's layers; writes the model, report.json and report.png."""
    import json

    import torch

    from effcore.cli.output import check_free
    from effcore.cli.progress import lines
    from effcore.errors import InputError, input_error
    from effcore.files import staged
    from effcore.methods import low_rank
    from effcore.methods.low_rank_checkpoint import DESCRIPTION, save_decomposed
    from effcore.training.models import load_model

    goals = [f"--{name}" for name, value in (("ratio", ratio), ("error", error), ("time", time)) if value is not None]
    if len(goals) != 1:
        raise InputError(f"give one of --ratio, --error and --time, got {' and '.join(goals) or 'none'}")
    if time is not None and text is None:
        raise InputError("--time needs --text: the tokens that layers are timed on")
    if text is not None and not text.is_file():
        raise InputError(f"--text {text}: no such file")
    if out.resolve() == Path(model).resolve():
        raise InputError(f"--out {out}: the model is there")
    check_free(out, DESCRIPTION, overwrite=overwrite)
    network, tokenizer = load_model(model)
    network.eval()
    if torch.cuda.is_available():  # layers are timed where the model is, and factored there
        network.cuda()
    data: list[Any] | None = None
    if text is not None:
        ids = tokenizer(text.read_text(encoding="utf-8", errors="replace"), return_tensors="pt")["input_ids"][0]
        data = [{"input_ids": part[None]} for part in ids.split(length)[:batches] if len(part)]
        if not data:
            raise InputError(f"--text {text}: the file is empty")
    try:
        low_rank.decompose(
            network,
            ratio,
            error=error,
            time=time,
            data=data,
            exclude=exclude or (),
            progress=None if quiet else lines("compress"),
        )
    except ValueError as bad:
        raise input_error(bad) from bad
    result = low_rank.report(network)
    with staged(out) as folder:
        save_decomposed(network, folder)
        tokenizer.save_pretrained(folder)
        result.write_json(folder / "report.json")
        result.plot(folder / "report.png")
    print(json.dumps(result.as_dict()) if json_ else result.table())
