r"""SwiftLearn: after a warm-up on all samples, train on the few whose outputs still move (arXiv 2311.15134).

Warm-up epochs see all N samples and record the model's outputs. From then on an epoch holds N·keep samples, drawn by
:mod:`effcore.methods.importance`. A run of E epochs costs 2 + (E − 2)·keep full ones: at most 3.57 times as fast at E = 10,
keep = 0.1.

    sampler = effcore.SwiftLearnSampler(dataset, keep=0.1, epochs=10)
    schedule = get_linear_schedule_with_warmup(optimizer, 100, sampler.total_steps(batch_size=32))
    for ids, batch in sampler.batches(dataset, batch_size=32):
        output = model(**batch)
        sampler.record(ids, output.logits)
        output.loss.backward() ...

The sampler spans the whole run: its iterator gives the samples of all epochs one after another, and its length counts them.
So a learning-rate schedule in steps needs no correction, and the Hugging Face Trainer takes the run for one epoch
(:class:`effcore.training.swiftlearn.SwiftLearnTrainer`).

Ours, where the paper is silent: the draw is made anew each epoch and without replacement (``select="gumbel"``);
``select="topk"`` is the paper's fixed subset, ``select="random"`` the baseline that it lacks. Importances can be refreshed by a
forward pass over everything or for the visited samples alone. In distributed runs each process records its own samples; the
records are gathered at the borders of epochs, one process draws, all follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from effcore.methods import importance
from effcore.methods._changes import Changes
from effcore.methods._gather import Processes
from effcore.methods._numbered import CollateNumbered, Numbered, WithSampleId

Scores = Tensor | tuple[Tensor, Tensor]  # values [B, W], or values and token counts [B]


class SwiftLearnSampler(Sampler[int]):
    """The order in which a whole run visits its samples.

    Args:
        dataset: anything with a length, or the number of samples N.
        keep: r, the share of the samples in an epoch after the warm-up; above 0, at most 1.
        epochs: E, of the whole run, the warm-up's among them.
        warmup_epochs: on all samples, at least 2 (0 with ``select="random"``).
        select: ``gumbel``, ``topk`` or ``random``.
        sigma: σ; 0 is the same as ``random``.
        refresh_every: K; importances are measured again before every K-th epoch after the warm-up. None: never.
        refresh: ``all`` measures by a forward pass over everything (see :meth:`score_with`); ``visited`` uses what the
            training passes record.
        recording: ``training`` takes the outputs of the warm-up's own passes; ``evaluation`` measures by forward passes over
            everything after each of the last two warm-up epochs, in evaluation mode, at the cost of 2/3 of an epoch.
        detrend: takes out of the training passes' recordings what is due to when a sample was visited (see
            :func:`effcore.methods.importance.detrended`); the paper does not.
        max_weight: reweights the loss by 1/(N·Pr), at most this; None does not (see :meth:`weights`).
        seed: of every order and draw.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        dataset: Sized | int,
        keep: float = 0.1,
        *,
        epochs: int = 10,
        warmup_epochs: int = 2,
        select: str = "gumbel",
        sigma: float = 1.0,
        refresh_every: int | None = None,
        refresh: str = "all",
        recording: str = "training",
        detrend: bool = False,
        max_weight: float | None = None,
        seed: int = 0,
    ):
        self.samples = dataset if isinstance(dataset, int) else len(dataset)
        self.keep, self.epochs, self.warmup_epochs = keep, epochs, warmup_epochs
        self.select, self.sigma, self.seed = select, sigma, seed
        self.refresh_every, self.refresh, self.recording = refresh_every, refresh, recording
        self.detrend, self.max_weight = detrend, max_weight
        self._check()
        self.kept = min(max(round(keep * self.samples), 1), self.samples)
        self._processes = Processes()
        self._score: Callable[[Tensor], Scores] | None = None
        self._score_batch = 256
        self._orders: dict[int, Tensor] = {}  # of the epochs after the warm-up, as drawn
        self._standard = importance.Standard(0.0, 0.0, 0.0)
        self._changes = Changes(self.samples, self._processes, None if self._uses_visits else warmup_epochs)
        self._steps = 0  # given out by batches()
        self._measured = 0  # the last epoch before which samples were measured by forward passes
        self._warned = False

    def _check(self) -> None:
        def require(ok: bool, what: str, value: object) -> None:
            if not ok:
                raise ValueError(f"effcore.SwiftLearnSampler: {what}, got {value!r}")

        require(self.samples > 0, "the dataset must not be empty", self.samples)
        require(0 < self.keep <= 1, "keep must be above 0 and at most 1", self.keep)
        require(self.select in importance.SELECTIONS, "select must be gumbel, topk or random", self.select)
        least = 0 if self.select == "random" else 2
        require(
            self.warmup_epochs >= least,
            f"warmup_epochs must be at least {least}: a change needs two recordings",
            self.warmup_epochs,
        )
        require(
            self.epochs >= max(self.warmup_epochs, 1),
            f"epochs must be at least warmup_epochs ({self.warmup_epochs})",
            self.epochs,
        )
        require(self.sigma >= 0, "sigma must not be negative", self.sigma)
        require(
            self.refresh_every is None or self.refresh_every > 0, "refresh_every must be positive", self.refresh_every
        )
        require(self.refresh in ("all", "visited"), "refresh must be all or visited", self.refresh)
        require(
            self.recording in ("training", "evaluation"), "recording must be training or evaluation", self.recording
        )
        require(self.max_weight is None or self.max_weight >= 1, "max_weight must be at least 1", self.max_weight)

    # ---------------------------------------------------------------- how long the run is

    def epoch_sizes(self) -> list[int]:
        """Samples of each epoch."""
        return [self.samples if epoch < self.warmup_epochs else self.kept for epoch in range(self.epochs)]

    def __len__(self) -> int:
        return sum(self.epoch_sizes())

    def total_steps(self, batch_size: int, *, processes: int = 1) -> int:
        """Optimizer steps that :meth:`batches` makes, for schedules of the learning rate; ``batch_size`` is a process's."""
        return sum(-(-size // (batch_size * processes)) for size in self.epoch_sizes())

    def progress(self, step: int, batch_size: int, *, processes: int = 1) -> float:
        """Epochs done after so many steps over all epochs, 0 to 1. A learning rate that falls by it falls mostly in the short
        epochs; one that falls by steps has fallen by most before they begin."""
        for epoch, size in enumerate(self.epoch_sizes()):
            steps = -(-size // (batch_size * processes))
            if step < steps:
                return (epoch + step / steps) / self.epochs
            step -= steps
        return 1.0

    @property
    def speedup_ceiling(self) -> float:
        """Epochs of a full run over those of this one: E / (2 + (E − 2)·keep), where nothing but samples costs."""
        return self.epochs * self.samples / len(self)

    # ---------------------------------------------------------------- orders

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self.epochs):
            yield from self.order(epoch).tolist()

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch in their order, int64. All processes ask together; the first call after the warm-up draws."""
        if epoch < self.warmup_epochs:
            self._measure(epoch)
            return self._permutation(epoch)
        if epoch not in self._orders:
            self._measure(epoch)
            self._orders[epoch] = self._drawn(epoch)
        return self._orders[epoch]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.samples, generator=self._generator(epoch))

    def _places(self, epoch: int) -> Tensor:
        """Where each sample stands in the order of a warm-up epoch."""
        places = torch.empty(self.samples, dtype=torch.long)
        places[self._permutation(epoch)] = torch.arange(self.samples)
        return places

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def _drawn(self, epoch: int) -> Tensor:
        if self.select == "random":
            order = importance.draw(
                self._changes.change, self.kept, select="random", sigma=0.0, generator=self._generator(epoch)
            )
            return self._processes.broadcast(order)
        self._changes.share()
        if epoch == self.warmup_epochs and self.recording == "training" and self.detrend:
            last = (self.warmup_epochs - 2, self.warmup_epochs - 1)
            self._changes.change = importance.detrended(self._changes.change, [self._places(e) for e in last])
        self._standard = importance.Standard.of(self._changes.change, self.sigma)
        if self._standard.is_constant and self.keep < 1 and not self._warned:
            self._warned = True
            why = "no sample has two recordings" if self._changes.change.isnan().all() else "all importances are equal"
            warnings.warn(f"effcore.SwiftLearnSampler: {why}; the draw is uniform", stacklevel=4)
        if self.select == "topk" and epoch > self.warmup_epochs and not self._refreshes(epoch):
            order = self._orders[epoch - 1]  # the same subset in another order
            order = order[torch.randperm(len(order), generator=self._generator(epoch))]
        else:
            order = importance.draw(
                self._changes.change, self.kept, select=self.select, sigma=self.sigma, generator=self._generator(epoch)
            )
        return self._processes.broadcast(order)

    def _refreshes(self, epoch: int) -> bool:
        after = epoch - self.warmup_epochs
        return self.refresh_every is not None and after > 0 and after % self.refresh_every == 0

    # ---------------------------------------------------------------- what is recorded

    @property
    def wants_records(self) -> bool:
        """Whether :meth:`record` still uses what it is given; a loop may skip it otherwise."""
        if self.select == "random" or self.keep == 1:
            return False
        return self._uses_visits or (self.recording == "training" and not self._orders)

    @property
    def _uses_visits(self) -> bool:
        return self.refresh_every is not None and self.refresh == "visited"

    def record(self, ids: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        """Notes the outputs of a training step; cheap, and copied to the host only now and then.

        Args:
            ids: sample numbers, integers [B].
            values: logits [B, W]; for a language model those of :func:`effcore.methods.importance.token_log_probs`, with
                its ``counts`` [B].

        Raises:
            ValueError: wrong shapes.
        """
        if values.dim() != 2 or values.shape[1] == 0 or ids.shape != values.shape[:1]:
            raise ValueError(
                f"effcore.SwiftLearnSampler.record: expected ids [B] and values [B, W] with W > 0, got "
                f"{list(ids.shape)} and {list(values.shape)}"
            )
        if not self.wants_records:
            return
        self._changes.record(ids, values, counts)

    def record_language(self, ids: Tensor, logits: Tensor, labels: Tensor) -> None:
        """:meth:`record` for a causal language model: logits [B, S, vocabulary], labels [B, S] with −100 for no label; rows
        padded on the right (see :func:`effcore.methods.importance.token_log_probs`)."""
        if self.wants_records:
            with torch.no_grad():
                self.record(ids, *importance.token_log_probs(logits, labels))

    # ---------------------------------------------------------------- measuring by forward passes

    def score_with(self, function: Callable[[Tensor], Scores], *, batch_size: int = 256) -> None:
        """How to measure samples outside training: ``function(ids [B]) -> values [B, W]`` (or values and counts), without
        gradients and in evaluation mode. Needed for ``recording="evaluation"`` and ``refresh="all"``."""
        self._score, self._score_batch = function, batch_size

    @property
    def needs_scoring(self) -> bool:
        """Whether the run measures by forward passes, so that :meth:`score_with` must have been called."""
        if self.select == "random" or self.keep == 1:
            return False
        return self.recording == "evaluation" or (self.refresh_every is not None and self.refresh == "all")

    def _measure(self, epoch: int) -> None:
        """Forward passes that are due before ``epoch``; then the processes share what they know."""
        if self.select == "random" or self.keep == 1:
            return
        due = self.recording == "evaluation" and self.warmup_epochs - 1 <= epoch <= self.warmup_epochs
        due = (due or (self.refresh == "all" and self._refreshes(epoch))) and epoch > self._measured
        if due:
            self._measured = epoch
            if self._score is None:
                raise RuntimeError(
                    "effcore.SwiftLearnSampler: samples are to be measured by forward passes, but score_with() was not called"
                )
            mine = torch.arange(self._processes.rank, self.samples, self._processes.count)
            for ids in mine.split(self._score_batch):
                scored = self._score(ids)
                values, counts = scored if isinstance(scored, tuple) else (scored, None)
                self._changes.store(ids, values.detach().float().cpu(), counts)
        if 0 < epoch <= self.warmup_epochs or due:
            self._changes.share()

    # ---------------------------------------------------------------- weights of the loss

    def weights(self, ids: Tensor) -> Tensor:
        """min(1/(N·Pr_i), max_weight), float32 [B] on ids' device; ones during the warm-up or where ``max_weight`` is None."""
        if self.max_weight is None or not self._orders or self._standard.is_constant:
            return torch.ones(ids.shape, device=ids.device)
        logits = self.sigma * self._standard.scores(self._changes.change[ids.cpu().long()])
        weights = (self._standard.log_total - logits).exp() / self.samples
        return weights.clamp(max=self.max_weight).to(ids.device)

    # ---------------------------------------------------------------- a plain loop

    def batches(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        num_workers: int = 0,
        forward: Callable[[Any], Scores] | None = None,
    ) -> Iterator[tuple[Tensor, Any]]:
        """(ids, batch) of the whole run; this process's share where torch.distributed runs.

        After :meth:`load_state_dict` it goes on behind the batch that was given out last.

        Args:
            batch_size: samples a process and step. Every process makes the same number of steps.
            forward: batch -> values, for :meth:`score_with`.
        """
        if batch_size < 1:
            raise ValueError(f"effcore.SwiftLearnSampler.batches: batch_size must be positive, got {batch_size}")
        if forward is not None:
            self.score_with(
                lambda ids: forward(collate_fn([dataset[i] for i in ids.tolist()])),  # type: ignore[misc]
                batch_size=batch_size,
            )
        if self.needs_scoring and self._score is None:
            raise ValueError(
                "effcore.SwiftLearnSampler.batches: forward is needed where samples are measured by forward passes"
            )
        rank, count = self._processes.rank, self._processes.count
        first = 0
        for epoch, size in enumerate(self.epoch_sizes()):
            steps = -(-size // (batch_size * count))
            if first + steps <= self._steps:
                first += steps
                continue
            order = self.order(epoch)
            share = -(-size // count)  # short by a few: processes at the end begin again at the front
            mine = torch.cat([order, order[: share * count - size]])[rank::count]
            chunks = [chunk.tolist() for chunk in mine.split(batch_size)]
            loader = DataLoader(
                Numbered(dataset),
                batch_sampler=chunks[self._steps - first :],  # type: ignore[arg-type]
                collate_fn=CollateNumbered(collate_fn),
                num_workers=num_workers,
            )
            first += steps
            for ids, batch in loader:
                self._steps += 1
                yield ids, batch

    def indexed(self, dataset: Dataset) -> Dataset:
        """The dataset with ``sample_id`` in each item (a dict): how ids reach the step where the loader is not ours."""
        return WithSampleId(dataset)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on: plain numbers and tensors. All processes call it together."""
        self._changes.share()
        return {
            "samples": self.samples,
            "settings": self._settings(),
            **self._changes.state_dict(with_values=self.wants_records or self.needs_scoring),
            "orders": {str(epoch): order.to(torch.int32) for epoch, order in self._orders.items()},
            "standard": [self._standard.mean, self._standard.deviation, self._standard.log_total],
            "steps": self._steps,
            "measured": self._measured,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state belongs to another dataset or other settings."""
        if state["samples"] != self.samples:
            raise ValueError(
                f"effcore.SwiftLearnSampler: the state is of {state['samples']} samples, the dataset has {self.samples}"
            )
        if state["settings"] != self._settings():
            raise ValueError(
                f"effcore.SwiftLearnSampler: the state was made with {state['settings']}, this sampler with {self._settings()}"
            )
        self._changes.load_state_dict(state)
        self._orders = {int(epoch): order.long() for epoch, order in state["orders"].items()}
        self._standard = importance.Standard(*state["standard"])
        self._steps, self._measured = state["steps"], state["measured"]

    def _settings(self) -> dict[str, Any]:
        names = (
            "keep",
            "epochs",
            "warmup_epochs",
            "select",
            "sigma",
            "refresh_every",
            "refresh",
            "recording",
            "detrend",
            "max_weight",
            "seed",
        )
        return {name: getattr(self, name) for name in names}
