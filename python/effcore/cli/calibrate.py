"""``effcore calibrate``: a Laplace posterior for a model of experts, and what it does to the honesty of its answers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer


def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder with a mixture-of-experts model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for posterior, scores and picture.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Questions as .jsonl: question, choices, answer. Default: made of Python's library."
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=10, help="Questions to make where there is no --data.")] = 600,
    targets: Annotated[str, typer.Option("--targets", help="experts, lora or last.")] = "experts",
    hessian: Annotated[str, typer.Option("--hessian", help="lowrank, kron or diag.")] = "lowrank",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of each expert's posterior (lowrank).")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions a batch.")] = 8,
    max_length: Annotated[int, typer.Option("--max-length", min=8, help="Tokens of a question.")] = 512,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted fit in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result in --out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Fits a posterior on 60 % of the questions, chooses its prior on 20 %, and scores the last 20 % before and after."""
    from effcore.cli.output import check_free
    from effcore.errors import InputError

    unfinished = ("fit.safetensors", "fit.safetensors.part")
    check_free(out, "scores.json", overwrite=overwrite or resume, unfinished=unfinished)
    fit_file = out / "fit.safetensors"
    if fit_file.exists() and not resume:
        if not overwrite:
            raise InputError(f"{fit_file} is of an interrupted fit: --resume goes on with it, --overwrite begins anew")
        fit_file.unlink()
    try:
        scores = _calibrate(
            model,
            out,
            data,
            fit_file,
            count=count,
            batch_size=batch_size,
            max_length=max_length,
            quiet=quiet,
            targets=targets,
            hessian=hessian,
            rank=rank,
        )
    except KeyboardInterrupt as error:
        if fit_file.exists():
            error.add_note("the same command with --resume goes on")
        raise
    if json_:
        print(json.dumps(scores))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "accuracy", "NLL", "ECE", "Brier")
    for name, row in scores["scores"].items():
        table.add_row(name, *(f"{row[key]:.4f}" for key in ("accuracy", "nll", "ece", "brier")))
    console = Console()
    console.print(table)
    for name, experts in scores["unrouted"].items():
        console.print(f"{name}: no token reached experts {', '.join(map(str, experts))}; they keep the prior")
    console.print(
        f"prior variance {scores['prior_variance'][0]:.3g} · {out / 'posterior.safetensors'} · {out / 'reliability.png'}"
    )


def _calibrate(
    model: str,
    out: Path,
    data: Path | None,
    fit_file: Path,
    *,
    count: int,
    batch_size: int,
    max_length: int,
    quiet: bool,
    **settings: Any,
) -> Any:
    import torch

    from effcore.cli.progress import lines
    from effcore.data.questions import answer_tokens, batches, next_line_questions, read_questions
    from effcore.data.sources import standard_library
    from effcore.errors import InputError, input_error
    from effcore.files import staged
    from effcore.methods._tracked import tracked
    from effcore.methods.bayesian_moe import laplace
    from effcore.methods.calibration import draw_reliability, fit_temperature, scores

    questions = read_questions(data) if data else next_line_questions(standard_library(), count)
    if len(questions) < 10:
        raise InputError(f"{data}: {len(questions)} questions; at least 10 are needed for fit, prior and test")
    first, second = int(0.6 * len(questions)), int(0.8 * len(questions))
    network, tokenizer = _load(Path(model))
    if torch.cuda.is_available():
        network.cuda()
    fit, held, test = (
        list(batches(part, tokenizer, size=batch_size, max_length=max_length))
        for part in (questions[:first], questions[first:second], questions[second:])
    )
    try:
        posterior = laplace(
            network,
            fit,
            answers=answer_tokens(tokenizer, len(questions[0].choices)),
            checkpoint=fit_file,
            keep_checkpoint=True,
            progress=None if quiet else partial(lines("fit"), "batch"),
            **settings,
        )
        posterior.fit_heldout(tracked(held, "batch", None if quiet else lines("prior")))

        def logits(part: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            return torch.cat([posterior.logit_distribution(b)[0].cpu() for b in part])

        def labels(part: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            return torch.cat([b["labels"] for b in part])

        plain, truth = logits(test), labels(test)
        temperature = fit_temperature(logits(held), labels(held))
        predictions = {
            "MAP": plain.softmax(1),
            f"temperature {temperature:.2f}": (plain / temperature).softmax(1),
            "posterior": torch.cat([posterior.predict(b).cpu() for b in test]),
        }
        result = {
            "scores": {name: scores(p, truth) for name, p in predictions.items()},
            "questions": {"fit": first, "prior": second - first, "test": len(questions) - second},
            "prior_variance": posterior.prior_variance.tolist(),
            "unrouted": posterior.unrouted,
        }
    except InputError as error:
        raise input_error(error) from error
    with staged(out) as folder:
        posterior.save(folder / "posterior.safetensors")
        draw_reliability(folder / "reliability.png", {name: (p, truth) for name, p in predictions.items()})
        (folder / "scores.json").write_text(json.dumps(result, indent=1))
    fit_file.unlink()
    return result


def _load(folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer; adapters come with their base model."""
    from transformers import AutoTokenizer

    from effcore.errors import InputError
    from effcore.training.models import quiet_transformers, whole_model

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{folder}: no model here (neither config.json nor adapter_config.json)")
    try:
        with quiet_transformers():
            network, tokenizer = whole_model(folder), AutoTokenizer.from_pretrained(folder)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if not tokenizer("A")["input_ids"]:  # transformers makes an empty one where there are no files
        raise InputError(f"{folder}: no usable tokenizer")
    return network.eval(), tokenizer
