"""``effcore adapt``: queries and a verifier in, an adapted model and a table out."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from effcore.data.json_lines import json_lines
from effcore.errors import InputError, RunError, disk_is_full, input_error
from effcore.files import check_place, staged, write_atomically
from effcore.methods.vds_report import measure, table
from effcore.methods.vds_run import is_run
from effcore.methods.vds_ttt import VerifierTTT
from effcore.methods.verifiers import ClassifierVerifier, ProcessRewardVerifier, Verifier, VerifierError
from effcore.training.models import load_model, quiet_transformers

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def read_queries(path: Path) -> tuple[list[str], list[str] | None]:
    """Prompts, and answers where every line has one, of a JSONL file with the fields ``prompt`` and ``answer``.

    Raises:
        InputError: naming the file and the line.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    prompts, answers = [], []
    for number, row in json_lines(path):
        if not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise InputError(f"{path}, line {number}: expected a text in the field 'prompt'")
        prompts.append(row["prompt"])
        if row.get("answer") is not None:
            answers.append(str(row["answer"]))
    if not prompts:
        raise InputError(f"{path}: the file holds no queries")
    if answers and len(answers) != len(prompts):
        raise InputError(
            f"{path}: {len(answers)} of {len(prompts)} queries have an answer; give all of them one, or none"
        )
    return prompts, answers or None


def last_number(text: str) -> str | None:
    """The last number of a response, without separators: what most arithmetic tasks compare."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


EXTRACT: dict[str, Callable[[str], Hashable | None]] = {
    "number": last_number,
    "text": lambda text: text.strip() or None,
}


def load_verifier(path: str, kind: str, device: str) -> Verifier:
    """A sequence classifier (``classifier``) or a token classifier that judges steps (``process``).

    Raises:
        InputError: there is no such model at ``path``, or it has not learnt to judge (its head has no weights there).
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    made = {"classifier": AutoModelForSequenceClassification, "process": AutoModelForTokenClassification}[kind]
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"--verifier {path}: no model here (no config.json)")
    try:
        with quiet_transformers():
            model, found = made.from_pretrained(path, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a dozen kinds for a bad file
        raise InputError(f"--verifier {path}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise InputError(f"--verifier {path}: not a trained {kind}: the file has no {missing}")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = model.to(device)
    if kind == "process":
        return ProcessRewardVerifier(model, tokenizer)
    return ClassifierVerifier(model, tokenizer)


def _check_free(out: Path, *, overwrite: bool) -> None:
    """Raises InputError where a new run would hit something; only a run is ever overwritten."""
    check_place(out)
    if out.is_dir() and any(out.iterdir()):
        if not is_run(out):
            raise InputError(f"--out {out}: the folder is not empty and holds no run of this command; choose another")
        if not overwrite:
            raise InputError(f"--out {out}: a run is here; continue it with --resume or replace it with --overwrite")


def _check_lengths(model: Any, tokenizer: Any, queries: list[str], new: int) -> None:
    """Raises InputError where a query and its response have more tokens than the model has positions, if it has any."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    length = max(len(ids) for ids in tokenizer(queries)["input_ids"])
    if length + new > limit:
        raise InputError(
            f"the longest query has {length} tokens; with --max-new-tokens {new} that is more than the model's {limit} "
            "positions"
        )


def adapt(
    model_path: str,
    queries: Path,
    verifier: str,
    out: Path,
    *,
    verifier_kind: str = "classifier",
    held_out: Path | None = None,
    compare: str = "number",
    merge: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    listener: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Adapts the model at ``model_path`` and writes the run folder ``out``.

    Returns:
        The content of ``report.json``: pairs selected, and the accuracies where the queries have answers.

    Raises:
        InputError: something that the user gave is wrong; also an unusable verifier.
        RunError: the disk is full, or training diverged.
    """
    prompts, answers = read_queries(queries)
    sets = {"adapted queries": (prompts, answers)}
    if held_out is not None:
        sets["held out"] = read_queries(held_out)
    if resume and not (out / "config.json").is_file():
        raise InputError(f"--resume {out}: no run here (no config.json)")
    if not resume:
        _check_free(out, overwrite=overwrite)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(model_path, dtype=torch.float32 if device == "cpu" else None)
    model = model.to(device)
    judge = load_verifier(verifier, verifier_kind, device)
    try:
        learner = VerifierTTT(model, tokenizer, judge, run=out, listener=listener, **settings)
    except ValueError as error:
        raise input_error(error) from error
    _check_lengths(model, tokenizer, [q for asked, _ in sets.values() for q in asked], learner.max_new_tokens)
    if out.is_dir() and not resume:
        shutil.rmtree(out)
    extract = EXTRACT[compare]
    rows: dict[str, dict[str, float]] = {}

    def evaluate(when: str, now: Any) -> None:
        for name, (asked, known) in sets.items():
            if known is not None:
                wanted = [extract(answer) for answer in known]

                def correct(i: int, text: str, wanted: list[Hashable | None] = wanted) -> bool:
                    return extract(text) == wanted[i]

                rows[f"{when}, {name}"] = measure(learner, now, asked, correct, extract)

    try:
        # First what the run folder keeps, so that an interruption costs no more than what is evaluated.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing changed is in the report
            adapted = learner.adapt(prompts)
        changed = any(learner.selected)
        with adapted.disable_adapter() if changed else nullcontext():
            evaluate("before", adapted)
        evaluate("after", adapted)
        if merge and changed:
            with quiet_transformers(), staged(out) as folder:
                adapted.merge_and_unload().save_pretrained(folder / "model")
                tokenizer.save_pretrained(folder / "model")
        report = {"selected": learner.selected, "queries": len(prompts), "changed": changed, "accuracy": rows}
        write_atomically(out / "report.json", json.dumps(report, indent=1) + "\n")
        if rows:
            write_atomically(
                out / "report.md", f"# VDS-TTT\n\nN = {learner.num_samples}, τ = {learner.threshold}\n\n{table(rows)}\n"
            )
    except KeyboardInterrupt as error:
        if is_run(out):
            error.add_note("the same command with --resume goes on")
        raise
    except VerifierError as error:
        raise InputError(f"--verifier {verifier}: {error}; what was drawn is in {out}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not disk_is_full(error):
            raise
        raise RunError(
            f"the disk is full ({out}): phases that are done are kept; free space, continue with --resume"
        ) from error
    return report
