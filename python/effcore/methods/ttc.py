r"""TTC-aware training: stop as soon as samples at test time make up for the rest of the training (arXiv 2601.01332).

At each checkpoint the accuracy of the full budget is projected from the checkpoints so far, and the accuracy with K samples a
query from those at K = 1, 2, 4, 8 (:mod:`effcore.methods.ttc_curves`). Training stops at the first checkpoint where

1. Â_K surely reaches the projection Â(B), less a margin, for some K ≤ K_max: by the lower bound of their difference; K* is the
smallest, 2. the tokens that the model will generate in its life stay below the break-even bound,
3. one real evaluation with K* samples confirms it in the same way.

    stopper = effcore.TTCEarlyStopping(evaluate, budget=total_tokens, lifetime=1e9)
    for step in ...:
        ...
        if step % 500 == 0 and stopper.check(model, step * tokens_per_step).stop:
            break                                     # answer with stopper.decision.samples samples a query

``evaluate(model, n)`` returns :class:`effcore.methods.ttc_accuracy.Samples`, n samples of each validation query; drawn with
:func:`effcore.methods.sampling.sample_texts` they cost one reading of each prompt. Ours: confidence bounds, the fourth K (three
determine three parameters exactly), the logarithmic curve, the real evaluation, that a curve which outran its own projections
is not trusted, and that validation is charged to training.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effcore.files import write_atomically
from effcore.methods._gather import Processes
from effcore.methods.ttc_accuracy import METRICS, Samples
from effcore.methods.ttc_curves import Curve, Estimate, TooFew, binomial, fit_samples, fit_training

if TYPE_CHECKING:
    from effcore.methods.ttc_callback import TTCCallback


@dataclass(frozen=True)
class Costs:
    """FLOPs a token, for break-even: 6N, 2N and V where nothing else is known (N parameters, only ratios matter)."""

    train: float = 6.0
    generate: float = 2.0
    verify: float = 0.0

    def __post_init__(self) -> None:
        if not (self.train > 0 and self.generate > 0 and self.verify >= 0):
            raise ValueError(f"effcore.Costs: train and generate must be positive and verify not negative, got {self}")

    @classmethod
    def measure(cls, model: Any, *, prompt: int, new: int, verify: float = 0.0) -> Costs:
        """Counted on the model itself, attention included: of a text of ``prompt`` + ``new`` tokens, and of its new ones."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

        from effcore.methods._surroundings import evaluating

        # The CPU's fused attention, which torch itself does not count.
        also = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
                q, k, v
            )
        }

        def forward(tokens: int) -> int:
            ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
            with evaluating(model), FlopCounterMode(display=False, custom_mapping=also) as counter:
                model(ids, use_cache=False)
            return counter.get_total_flops()

        whole = forward(prompt + new)
        return cls(3 * whole / (prompt + new), (whole - forward(prompt)) / new, verify)

    def break_even(self, saved: float, samples: int) -> float:
        """T_max: generated tokens, of one sample a query, over the model's life, up to which K samples cost less than the
        training that they save. With 6N, 2N and a verifier of V a token: 3·(D_B − D_t) / (K·(1 + V/2N) − 1).

        Args:
            saved: training tokens D_B − D_t, less what evaluation cost.
        """
        extra = samples * (self.generate + self.verify) - self.generate
        return math.inf if extra <= 0 else max(self.train * saved / extra, 0.0)


@dataclass(frozen=True)
class Decision:
    """What was found at a checkpoint. ``samples`` is K*, and ``reason`` says in a sentence why training stops or goes on."""

    tokens: float
    stop: bool
    reason: str
    accuracies: dict[int, float]
    samples: int | None = None
    projected: float | None = None  # Â(B)
    projected_bounds: tuple[float, float] | None = None
    expected: float | None = None  # Â_K at K*
    measured: float | None = None  # by the real evaluation with K* samples
    break_even: float | None = None  # T_max in generated tokens
    evaluation_tokens: float = 0.0  # generated for evaluation up to here
    saved: float = 0.0  # share of the training tokens, evaluation charged

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON takes it; a break-even without limit is None."""
        row = asdict(self)
        row["accuracies"] = {str(k): v for k, v in self.accuracies.items()}
        if row["break_even"] == math.inf:
            row["break_even"] = None
        return row


@dataclass
class TTCPlan:
    """The decision alone, from accuracies: what ``effcore plan ttc`` runs, and :class:`TTCEarlyStopping` with a model.

    Args:
        budget: B, the training tokens of the full run.
        items: validation queries behind each accuracy.
        most_samples: K_max.
        lifetime: tokens that the model will generate in its life with one sample a query; None: not limited.
        confidence: of the bounds; the stop needs the lower one.
        margin: accuracy (0 to 1) that may be lost to the projection. At 0 nothing measured can surely reach a projection near
            100 %, however good it is.
    """

    budget: float
    items: int
    most_samples: int = 32
    lifetime: float | None = None
    costs: Costs = field(default_factory=Costs)
    confidence: float = 0.9
    margin: float = 0.0
    points: list[tuple[float, dict[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        def require(ok: bool, what: str, value: object) -> None:
            if not ok:
                raise ValueError(f"effcore.TTCPlan: {what}, got {value}")

        require(self.budget > 0, "budget must be positive", self.budget)
        require(self.items > 0, "items must be positive", self.items)
        require(self.most_samples >= 2, "most_samples must be at least 2", self.most_samples)
        require(self.lifetime is None or self.lifetime >= 0, "lifetime must not be negative", self.lifetime)
        require(0 < self.confidence < 1, "confidence must be between 0 and 1", self.confidence)
        require(0 <= self.margin < 1, "margin must be from 0 to below 1", self.margin)

    def add(
        self,
        tokens: float,
        accuracies: dict[int, float],
        *,
        evaluation_tokens: float = 0.0,
        confirm: Callable[[int], tuple[float, float]] | None = None,
    ) -> Decision:
        """The decision at a checkpoint.

        Args:
            tokens: trained on so far; each call's must exceed the last one's.
            accuracies: by number of samples; 1 must be among them.
            evaluation_tokens: generated for evaluation so far.
            confirm: K -> accuracy of a real evaluation with K samples, and its tokens. None decides without it.

        Raises:
            ValueError: an accuracy outside 0 to 1, none at one sample, or tokens that do not grow.
        """
        for k, accuracy in accuracies.items():
            if not 0 <= accuracy <= 1:
                raise ValueError(f"effcore.TTCPlan: the accuracy at {k} samples must be from 0 to 1, got {accuracy}")
        if 1 not in accuracies:
            raise ValueError(f"effcore.TTCPlan: the accuracy at 1 sample is needed, got those at {sorted(accuracies)}")
        if self.points and tokens <= self.points[-1][0]:
            raise ValueError(
                f"effcore.TTCPlan: checkpoints must come in order, got {tokens:g} tokens after {self.points[-1][0]:g}"
            )
        self.points.append((tokens, dict(accuracies)))
        found: dict[str, Any] = {"evaluation_tokens": evaluation_tokens}

        def decide(stop: bool, reason: str, **more: Any) -> Decision:
            found.update(more)
            spent = self._charged(found["evaluation_tokens"])
            found["saved"] = (self.budget - tokens - spent) / self.budget if stop else 0.0
            return Decision(tokens, stop, reason, dict(accuracies), **found)

        if tokens >= self.budget:
            return decide(False, "the budget is spent")
        if not any(accuracies.values()):
            return decide(False, "no query is answered right yet")
        try:
            training, sampling = self.curves()
        except TooFew as missing:
            return decide(False, str(missing))
        goal = training(self.budget)
        found |= {"projected": goal.value, "projected_bounds": (goal.low, goal.high)}
        outrun = self._outrun()
        if outrun is not None:
            return decide(False, outrun)
        samples = next((k for k in range(1, self.most_samples + 1) if self._enough(sampling(k), goal)), None)
        if samples is None:
            best = sampling(self.most_samples)
            return decide(False, f"{self.most_samples} samples are expected to reach {best}, the full budget {goal}")
        bound = self.costs.break_even(self.budget - tokens - self._charged(evaluation_tokens), samples)
        found |= {"samples": samples, "expected": sampling(samples).value, "break_even": bound}
        if self.lifetime is not None and self.lifetime > bound:
            return decide(
                False,
                f"{samples} samples would do, but pay off only up to {bound:.3g} generated tokens, and "
                f"{self.lifetime:.3g} are expected",
            )
        if confirm is None:
            return decide(True, f"{samples} samples are expected to reach {sampling(samples)}, the full budget {goal}")
        measured, tokens_used = confirm(samples)
        found |= {"measured": measured, "evaluation_tokens": evaluation_tokens + tokens_used}
        estimate = binomial(measured, self.items, self.confidence)
        sure = estimate.surely_reaches(goal, self.margin)
        verdict = "which confirms it" if sure else "which does not confirm it"
        return decide(sure, f"with {samples} samples {estimate} were measured against {goal} projected, {verdict}")

    def _enough(self, expected: Estimate, goal: Estimate) -> bool:
        """Also for the evaluation that is to confirm it, which has the noise of so many items."""
        noisy = binomial(expected.value, self.items, self.confidence)
        return expected.surely_reaches(goal, self.margin) and noisy.surely_reaches(goal, self.margin)

    def _outrun(self) -> str | None:
        """Says so where the accuracy of now surely exceeds what the checkpoints up to three quarters of the tokens projected
        for now. A curve that still bends upwards is no saturating curve, and ends far above its projection."""
        now, accuracies = self.points[-1]
        early = [(tokens, row[1]) for tokens, row in self.points if tokens <= 0.75 * now]
        tokens, single = np.array(early).reshape(-1, 2).T
        try:
            then = fit_training(tokens, single, self.items, confidence=self.confidence)(now)
        except TooFew:
            return None
        measured = binomial(accuracies[1], self.items, self.confidence)
        if measured.low <= then.high:
            return None
        return f"the accuracy outruns its projections: {measured} now, {then} was projected from three quarters of the tokens"

    def _charged(self, evaluation_tokens: float) -> float:
        """Evaluation in training tokens: what was generated, and verified, costs FLOPs like them."""
        return evaluation_tokens * (self.costs.generate + self.costs.verify) / self.costs.train

    def curves(self) -> tuple[Curve, Curve]:
        """The fits to all checkpoints so far, and to the last one's accuracies. Raises TooFew."""
        tokens = np.array([point[0] for point in self.points])
        single = np.array([point[1][1] for point in self.points])
        last = dict(sorted(self.points[-1][1].items()))
        training = fit_training(tokens, single, self.items, confidence=self.confidence)
        ks, accuracies = np.array(list(last)), np.array(list(last.values()))
        return training, fit_samples(ks, accuracies, self.items, confidence=self.confidence)


class TTCEarlyStopping:
    """Evaluates checkpoints with few samples and says when to stop; for a plain loop, and as a Trainer callback.

    Args:
        evaluate: (model, n) -> n samples of each validation query, always of the same queries.
        budget, most_samples, lifetime, costs, confidence, margin: see :class:`TTCPlan`.
        metric: how K samples are made one answer: ``majority``, ``verifier`` or ``pass`` (the last presumes a checker at
            test time).
        ks: numbers of samples to fit; the largest is what each checkpoint costs.
        log: a JSONL file with a line a decision. Where it exists the run goes on from it.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        evaluate: Callable[[Any, int], Samples],
        *,
        budget: float,
        metric: str = "majority",
        ks: Sequence[int] = (1, 2, 4, 8),
        most_samples: int = 32,
        lifetime: float | None = None,
        costs: Costs | None = None,
        confidence: float = 0.9,
        margin: float = 0.0,
        log: str | Path | None = None,
    ):
        if metric not in METRICS:
            raise ValueError(f"effcore.TTCEarlyStopping: metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if len(set(ks)) < 3 or min(ks) != 1 or max(ks) > most_samples:
            raise ValueError(
                f"effcore.TTCEarlyStopping: ks must be at least three numbers from 1 to most_samples ({most_samples}) with 1 "
                f"among them, got {tuple(ks)}"
            )
        self.evaluate, self.metric, self.ks = evaluate, metric, sorted(set(ks))
        self.plan = TTCPlan(budget, 1, most_samples, lifetime, costs or Costs(), confidence, margin)
        self.log = None if log is None else Path(log)
        self.decisions: list[Decision] = []
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            if self.log.is_file():
                self._continue()

    @property
    def decision(self) -> Decision | None:
        """The last one."""
        return self.decisions[-1] if self.decisions else None

    @property
    def evaluation_tokens(self) -> float:
        """Generated for evaluation so far."""
        return self.decisions[-1].evaluation_tokens if self.decisions else 0.0

    def check(self, model: Any, tokens: float) -> Decision:
        """Evaluates the model after so many training tokens. A checkpoint that the log already has is not evaluated again."""
        if self.decisions and tokens <= self.decisions[-1].tokens:
            known = [decision for decision in self.decisions if decision.tokens == tokens]
            if known:
                return known[0]
        drawn = self.evaluate(model, max(self.ks))
        if drawn.count < max(self.ks):
            raise ValueError(
                f"effcore.TTCEarlyStopping: evaluate returned {drawn.count} samples of each query, "
                f"{max(self.ks)} were asked for"
            )
        self.plan.items = drawn.queries

        def confirm(samples: int) -> tuple[float, float]:
            if samples <= drawn.count:
                return drawn.accuracy(samples, self.metric), 0
            more = self.evaluate(model, samples)
            return more.accuracy(samples, self.metric), more.tokens

        decision = self.plan.add(
            tokens,
            {k: drawn.accuracy(k, self.metric) for k in self.ks},
            evaluation_tokens=self.evaluation_tokens + drawn.tokens,
            confirm=confirm,
        )
        self.decisions.append(decision)
        self._write()
        return decision

    def callback(self, *, every: int, tokens_per_step: float) -> TTCCallback:
        """For the Hugging Face Trainer: checks every so many steps, saves and stops where it is time."""
        from effcore.methods.ttc_callback import TTCCallback

        return TTCCallback(self, every, tokens_per_step)

    def _continue(self) -> None:
        assert self.log is not None
        for number, line in enumerate(self.log.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # cut off by a crash: that checkpoint is evaluated again
            try:
                self.plan.items = row.pop("items")
                row["accuracies"] = {int(k): v for k, v in row["accuracies"].items()}
                self.decisions.append(Decision(**row))
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"effcore.TTCEarlyStopping: {self.log}, line {number}, is no decision ({error})"
                ) from error
        self.plan.points = [(decision.tokens, decision.accuracies) for decision in self.decisions]

    def _write(self) -> None:
        """All decisions, whole or not at all. Where the disk is full training goes on: the next checkpoint writes them."""
        if self.log is None or Processes().rank != 0:
            return
        lines = [json.dumps({"items": self.plan.items, **decision.as_json()}) + "\n" for decision in self.decisions]
        try:
            write_atomically(self.log, "".join(lines))
        except OSError as error:
            why = error.strerror or error
            warnings.warn(
                f"effcore.TTCEarlyStopping: {self.log} cannot be written ({why}); the next checkpoint tries again",
                stacklevel=3,
            )
