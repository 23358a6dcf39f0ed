"""Who judges a response: anything with ``score(prompts, responses) -> [0, 1]``; adapters for models, and the choice of τ.

- :class:`ClassifierVerifier`: a sequence classifier reads prompt and response.
- :class:`ProcessRewardVerifier`: a process reward model, whose judgement of the last step counts.
- :func:`train_verifier`: a classifier trained on responses that were checked.
- :func:`calibrate`: the threshold above which enough of what is selected is right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from effcore.methods.ttc_curves import binomial


class Verifier(Protocol):
    """Anything that scores responses."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        """How likely each response answers its prompt, 0 to 1."""
        ...


class VerifierError(ValueError):
    """A verifier did not return a number from 0 to 1 for each response."""


def checked_scores(verifier: Verifier, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The verifier's scores. Raises VerifierError for a wrong count, NaN, or a score outside 0 to 1."""
    scores = [float(score) for score in verifier.score(prompts, responses)]
    if len(scores) != len(responses):
        raise VerifierError(f"the verifier returned {len(scores)} scores for {len(responses)} responses")
    for i, score in enumerate(scores):
        if not 0 <= score <= 1:  # NaN too
            raise VerifierError(
                f"the verifier's score {score} is not from 0 to 1 (response {responses[i][:60]!r} to {prompts[i][:60]!r})"
            )
    return scores


class _ModelVerifier(ABC):
    """Batches of prompt + response through a model.

    Args:
        model: on its device, in its dtype.
        tokenizer: pads on the right; texts longer than ``max_length`` tokens lose their beginning.
        template: how prompt and response are put together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str = "{prompt}{response}",
        batch_size: int = 64,
        max_length: int = 2048,
    ):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, template
        self.batch_size, self.max_length = batch_size, max_length

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [self.template.format(prompt=p, response=r) for p, r in zip(prompts, responses, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            ids, mask = _padded(self.tokenizer, [texts[i] for i in chosen], self.max_length, self._device)
            for i, score in zip(chosen, self._judge(ids, mask).tolist(), strict=True):
                scores[i] = score
        return scores

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @abstractmethod
    def _judge(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A score a row of padded tokens."""


class ClassifierVerifier(_ModelVerifier):
    """A Hugging Face sequence classifier: the probability of the class ``positive``, or the sigmoid of a single logit."""

    def __init__(self, model: Any, tokenizer: Any, *, positive: int = 1, **options: Any):
        super().__init__(model, tokenizer, **options)
        self.positive = positive

    def _judge(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        return logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.positive]


class ProcessRewardVerifier(_ModelVerifier):
    """A process reward model: the probability that the last step is good.

    Args:
        labels: (bad, good): classes of a token classifier, or token ids of a causal model that answers with words.
        separator: ends a step; put behind the response where it does not stand there.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, labels: tuple[int, int] = (0, 1), separator: str = "\n\n", **options: Any
    ):
        super().__init__(model, tokenizer, **options)
        self.labels, self.separator = labels, separator

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        ended = [r if r.endswith(self.separator) else r + self.separator for r in responses]
        return super().score(prompts, ended)

    def _judge(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        last = logits[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1].float()
        return last[:, list(self.labels)].softmax(-1)[:, 1]


def train_verifier(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    correct: Sequence[bool],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> ClassifierVerifier:
    """Trains a sequence classifier of two classes on responses that were checked; half of each batch is right.

    Raises:
        ValueError: the responses are all right or all wrong.
    """
    labels = torch.tensor([bool(c) for c in correct])
    right, wrong = labels.nonzero().flatten(), (~labels).nonzero().flatten()
    if not len(right) or not len(wrong):
        raise ValueError(
            f"effcore.train_verifier: needs right and wrong responses, got {len(right)} right and {len(wrong)} wrong"
        )
    verifier = ClassifierVerifier(model, tokenizer, **options)
    texts = [verifier.template.format(prompt=p, response=r) for p, r in zip(prompts, responses, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        halves = [side[torch.randint(len(side), (batch_size // 2,), generator=generator)] for side in (right, wrong)]
        chosen = torch.cat(halves)
        device = next(model.parameters()).device
        ids, mask = _padded(tokenizer, [texts[i] for i in chosen.tolist()], verifier.max_length, device)
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        torch.nn.functional.cross_entropy(logits, labels[chosen].long().to(device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()
    return verifier


def calibrate(
    scores: Sequence[float], correct: Sequence[bool], *, precision: float = 0.95, confidence: float = 0.9
) -> float:
    """The smallest τ at which what reaches it is right with ``precision``, by the lower bound of its binomial interval.

    Args:
        scores: of the best response to each query, as they are selected.

    Raises:
        ValueError: no threshold does; the message says what the best one reaches.
    """
    if len(scores) != len(correct) or not len(scores):
        raise ValueError(f"effcore.calibrate: got {len(scores)} scores and {len(correct)} labels")
    if not all(map(math.isfinite, scores)):
        raise ValueError("effcore.calibrate: a score is not finite")
    ranked = sorted(zip(scores, correct, strict=True), reverse=True)
    right, threshold, best = 0, None, (0.0, 1.0, 0)
    for count, (score, ok) in enumerate(ranked, start=1):
        right += bool(ok)
        if count < len(ranked) and ranked[count][0] == score:
            continue  # equal scores are selected together
        low = binomial(right / count, count, confidence).low
        best = max(best, (low, score, count))
        if low >= precision:
            threshold = score
    if threshold is None:
        raise ValueError(
            f"effcore.calibrate: no threshold reaches a precision of {precision:.0%}: at {best[1]:.3g}, which selects "
            f"{best[2]} of {len(ranked)}, it is at least {best[0]:.1%}; a better verifier or more labelled queries are needed"
        )
    return threshold


def _padded(tokenizer: Any, texts: list[str], most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the right; each text's last ``most`` tokens."""
    rows = [tokenizer(text)["input_ids"][-most:] for text in texts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask
