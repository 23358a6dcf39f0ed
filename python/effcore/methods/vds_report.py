"""What VDS-TTT is reported with: greedy, best-of-N by the verifier, majority and oracle accuracy, before and after."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from effcore.methods.sampling import sample_responses
from effcore.methods.ttc_accuracy import Samples
from effcore.methods.vds_ttt import VerifierTTT
from effcore.methods.verifiers import checked_scores

COLUMNS = ("greedy", "best_of_n", "majority", "oracle")


def measure(
    learner: VerifierTTT,
    model: Any,
    queries: Sequence[str],
    correct: Callable[[int, str], bool],
    extract: Callable[[str], Hashable | None],
    *,
    seed: int = 10_000,
) -> dict[str, float]:
    """Accuracies of a model on queries whose answers are known, with the learner's verifier and settings of sampling.

    Args:
        correct: (number of the query, response) -> whether it is right.
        extract: response -> final answer, for the majority.

    Returns:
        ``greedy``, ``best_of_n``, ``majority``, ``oracle`` (0 to 1), each with ``<name>_error``, its standard error.
    """
    greedy = np.zeros(len(queries))
    settings: dict[str, Any] = {"max_new_tokens": learner.max_new_tokens, "batch_size": learner.generation_batch}
    settings["seed"] = seed
    for i, (response,) in sample_responses(
        model, learner.tokenizer, queries, num_samples=1, do_sample=False, **settings
    ):
        greedy[i] = correct(i, response.text)
    texts: list[list[str]] = [[] for _ in queries]
    for i, responses in sample_responses(
        model,
        learner.tokenizer,
        queries,
        num_samples=learner.num_samples,
        temperature=learner.temperature,
        top_p=learner.top_p,
        top_k=0,
        **settings,
    ):
        texts[i] = [response.text for response in responses]
    scores = checked_scores(
        learner.verifier,
        [query for query in queries for _ in range(learner.num_samples)],
        [t for row in texts for t in row],
    )
    samples = Samples(
        np.array([[correct(i, text) for text in row] for i, row in enumerate(texts)]),
        [[extract(text) for text in row] for row in texts],
        np.array(scores).reshape(len(queries), -1),
    )
    n = learner.num_samples
    each = {
        "greedy": greedy,
        "best_of_n": samples.per_query(n, "verifier"),
        "majority": samples.per_query(n, "majority"),
        "oracle": samples.per_query(n, "pass"),
    }
    found = {name: float(values.mean()) for name, values in each.items()}
    found |= {f"{name}_error": float(values.std() / len(queries) ** 0.5) for name, values in each.items()}
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of :func:`measure` by name, as Markdown: accuracy ± standard error."""
    lines = ["| | greedy | best-of-N (verifier) | majority | oracle |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.1%} ± {row[f'{c}_error']:.1%}" for c in COLUMNS]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)
