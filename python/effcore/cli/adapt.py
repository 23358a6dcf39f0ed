"""``effcore adapt``: a model trains on its own samples that a verifier trusts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from effcore.cli.options import Seed


def adapt(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a run folder of effcore train, or a GGUF file.")],
    queries: Annotated[
        Path, typer.Option("--queries", help='JSONL: {"prompt": ...} a line; with "answer" accuracies are reported.')
    ],
    verifier: Annotated[
        str, typer.Option("--verifier", help="A Hugging Face folder: the model that scores responses.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder.")] = Path("runs", "adapt"),
    verifier_kind: Annotated[
        str,
        typer.Option("--verifier-kind", help="classifier (of whole responses) or process (of steps; the last counts)."),
    ] = "classifier",
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="Queries like the others, with answers: reported, not adapted to.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="N, responses a query.")] = 16,
    threshold: Annotated[
        float, typer.Option("--threshold", help="τ, the score from which a response is trusted.")
    ] = 0.99,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the samples.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Length of a response at most.")] = 256,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the LoRA matrices; alpha is twice that.")] = 128,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 2e-5,
    epochs: Annotated[int, typer.Option("--epochs")] = 3,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 8,
    mode: Annotated[
        str, typer.Option("--mode", help="transductive (all queries, then train) or online.")
    ] = "transductive",
    online_steps: Annotated[int, typer.Option("--online-steps", help="Steps after each accepted query (online).")] = 1,
    iterations: Annotated[int, typer.Option("--iterations", help="How often to sample and train.")] = 1,
    generation_batch: Annotated[
        int, typer.Option("--generation-batch", help="Queries that are sampled together.")
    ] = 16,
    compare: Annotated[str, typer.Option("--compare", help="Answers as number (the last one) or text.")] = "number",
    merge: Annotated[
        bool, typer.Option("--merge", help="Also save the model with the adapters merged, as model/.")
    ] = False,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; give the same options.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Trains LoRA adapters on the responses to these queries that a verifier trusts (VDS-TTT)."""
    from effcore.errors import InputError

    for option, value, known in (
        ("--verifier-kind", verifier_kind, ("classifier", "process")),
        ("--compare", compare, ("number", "text")),
    ):
        if value not in known:
            raise InputError(f"{option} must be {' or '.join(known)}, got {value}")
    from effcore.cli.progress import lines
    from effcore.methods.vds_ttt import LoraSettings
    from effcore.training.adapt import adapt as run

    report = run(
        model,
        queries,
        verifier,
        out,
        verifier_kind=verifier_kind,
        held_out=held_out,
        compare=compare,
        merge=merge,
        resume=resume,
        overwrite=overwrite,
        listener=None if quiet else lines("adapt"),
        num_samples=num_samples,
        threshold=threshold,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        lora=LoraSettings(rank, 2.0 * rank),
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        mode=mode,
        online_steps=online_steps,
        iterations=iterations,
        generation_batch=generation_batch,
        seed=seed,
    )
    if json_:
        print(json.dumps(report))
        return
    if not report["changed"]:
        print(f"No response reached the threshold {threshold}: the model is unchanged. See {out / 'scores-0.jsonl'}")
    else:
        print(f"Trained on {' + '.join(map(str, report['selected']))} of {report['queries']} queries; see {out}")
    for name, row in report["accuracy"].items():
        print(
            f"{name:<24} greedy {row['greedy']:.1%}  best-of-{num_samples} {row['best_of_n']:.1%}  "
            f"majority {row['majority']:.1%}  oracle {row['oracle']:.1%}"
        )
