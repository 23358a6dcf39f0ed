r"""VDS-TTT: test-time training on the samples that a learned verifier trusts (arXiv 2505.19475).

For each query x, N responses are drawn at temperature T; a verifier scores them; the best one, where its score reaches τ,
becomes a pseudo-label y; LoRA parameters alone are trained on −log p(y, end | x).

    learner = effcore.VerifierTTT(model, tokenizer, verifier, num_samples=16, threshold=0.99, run="runs/adapt")
    adapted = learner.adapt(queries)          # a PeftModel; adapted.merge_and_unload() makes it a plain one

``mode="transductive"`` draws for all queries, then trains (what the paper's experiments do); ``mode="online"`` takes M steps
after each accepted query (its Algorithm 1). ``iterations`` repeats the whole with the adapted model. The defaults are the
paper's settings. A response that did not come to its end is trained on without the end token. Where no response reaches τ
the model is returned as it was, with a warning.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcore.errors import InputError, RunError
from effcore.methods._surroundings import random_state_kept
from effcore.methods.sampling import Response, sample_responses
from effcore.methods.vds_run import Entries, Journal, RunFiles
from effcore.methods.verifiers import Verifier, checked_scores

Listener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters; modules that the model lacks are left out."""

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.1
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class VerifierTTT:
    """Adapts a model to queries without labels.

    Args:
        model: a causal language model.
        tokenizer: its own.
        verifier: see :mod:`effcore.methods.verifiers`.
        num_samples: N.
        threshold: τ.
        temperature, top_p, max_new_tokens: of the samples.
        learning_rate, epochs, batch_size: of the LoRA training; the rate falls linearly to 0.
        mode: ``transductive`` or ``online``.
        online_steps: M, steps after each accepted query.
        iterations: how often samples are drawn and trained on.
        generation_batch: queries that are sampled together.
        run: a folder for pool, scores, selection and adapters (:mod:`effcore.methods.vds_run`); the same call goes on from what
            lies there.
        listener: (phase, done, total).

    Raises:
        ValueError: a setting out of range.
    """

    model: Any
    tokenizer: Any
    verifier: Verifier
    num_samples: int = 16
    threshold: float = 0.99
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 256
    lora: LoraSettings = field(default_factory=LoraSettings)
    learning_rate: float = 2e-5
    epochs: int = 3
    batch_size: int = 8
    mode: str = "transductive"
    online_steps: int = 1
    iterations: int = 1
    generation_batch: int = 16
    seed: int = 0
    run: str | Path | None = None
    listener: Listener | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, what: str, value: object) -> None:
            if not ok:
                raise ValueError(f"effcore.VerifierTTT: {what}, got {value!r}")

        for name in (
            "num_samples",
            "max_new_tokens",
            "epochs",
            "batch_size",
            "online_steps",
            "iterations",
            "generation_batch",
        ):
            require(getattr(self, name) >= 1, f"{name} must be positive", getattr(self, name))
        require(0 <= self.threshold <= 1, "threshold must be from 0 to 1", self.threshold)
        require(self.temperature > 0, "temperature must be positive", self.temperature)
        require(0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p)
        require(self.learning_rate > 0, "learning_rate must be positive", self.learning_rate)
        require(self.mode in ("transductive", "online"), "mode must be transductive or online", self.mode)
        self.selected: list[int] = []  # pairs trained on in each iteration
        self._adapted: Any = None  # what holds the adapters of the last call

    def adapt(self, queries: Sequence[str]) -> Any:
        """The adapted model (a ``PeftModel``, in evaluation mode), or the model as it was where no response reached τ.

        The adapters stand in ``model`` itself. A second call begins from the model without them, and what the first one
        returned loses them then: merge or save it before. Where a call fails the model is what it was before the call.

        Raises:
            ValueError: no queries.
            VerifierError: the verifier's scores are unusable. What was drawn is kept in the run folder.
            InputError: the run folder holds another run, or a damaged adapter.
            RunError: training diverged: the loss or the logits hold NaN or infinity.
        """
        if not len(queries):
            raise ValueError("effcore.VerifierTTT.adapt: the list of queries is empty")
        files = RunFiles(None if self.run is None else Path(self.run), self._config(queries))
        self._take_off()
        self.selected = []
        model = self.model
        with random_state_kept(model), self._undone_on_failure():
            for iteration in range(self.iterations):
                if self.mode == "online":
                    model = self._online(model, queries, files, iteration)
                else:
                    model = self._transductive(model, queries, files, iteration)
        if not any(self.selected):
            warnings.warn(
                f"effcore.VerifierTTT: no response reached the threshold {self.threshold}; the model is unchanged",
                stacklevel=2,
            )
        files.write("summary.json", {"queries": len(queries), "selected": self.selected, "mode": self.mode})
        return model

    # ---------------------------------------------------------------- phases

    def draw(self, model: Any, queries: Sequence[str], pool: Entries, *, seed: int) -> list[list[Response]]:
        """N responses to each query; those that the journal has are not drawn again."""
        missing = {i for i in range(len(queries)) if i not in pool.rows}
        drawn = 0
        # Batches are cut from the whole list, so that an interrupted run draws what it would have drawn.
        for start in range(0, len(queries), self.generation_batch):
            batch = range(start, min(start + self.generation_batch, len(queries)))
            if not any(i in missing for i in batch):
                continue
            found = sample_responses(
                model,
                self.tokenizer,
                [queries[i] for i in batch],
                num_samples=self.num_samples,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.generation_batch,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0,
                seed=seed * 1_000_003 + start,
            )
            for i, responses in found:
                if start + i in missing:
                    pool.add({"query": start + i, "responses": [asdict(response) for response in responses]})
            drawn += len(batch)
            self._tell("drawing", drawn, len(missing))
        return [[Response(**r) for r in pool.rows[i]["responses"]] for i in range(len(queries))]

    def judge(self, queries: Sequence[str], responses: list[list[Response]], journal: Entries) -> list[list[float]]:
        """Scores of each response; those that the journal has are not asked for again."""
        missing = [i for i in range(len(queries)) if i not in journal.rows]
        for start in range(0, len(missing), self.generation_batch):
            chosen = missing[start : start + self.generation_batch]
            prompts = [queries[i] for i in chosen for _ in responses[i]]
            scores = checked_scores(self.verifier, prompts, [r.text for i in chosen for r in responses[i]])
            at = 0
            for i in chosen:
                journal.add({"query": i, "scores": scores[at : at + len(responses[i])]})
                at += len(responses[i])
            self._tell("judging", start + len(chosen), len(missing))
        return [journal.rows[i]["scores"] for i in range(len(queries))]

    def select(self, scores: list[list[float]]) -> list[tuple[int, int]]:
        """(query, response) of the best responses that reach τ; the first of equals."""
        best = [max(range(len(row)), key=row.__getitem__) for row in scores]
        return [(i, j) for i, j in enumerate(best) if scores[i][j] >= self.threshold]

    def _transductive(self, model: Any, queries: Sequence[str], files: RunFiles, iteration: int) -> Any:
        pool, judged = files.journal("pool", iteration), files.journal("scores", iteration)
        responses = self.draw(model, queries, pool, seed=self.seed + iteration)
        scores = self.judge(queries, responses, judged)
        pairs = self.select(scores)
        chosen = files.journal("selected", iteration)
        for i, j in pairs:
            if i not in chosen.rows:
                chosen.add({"query": i, "response": j, "score": scores[i][j]})
        self.selected.append(len(pairs))
        if not pairs:
            return model
        done = files.adapter(iteration)
        if done is not None:
            return self._load(model, done)
        model = self._with_adapter(model)
        examples = [(queries[i], responses[i][j]) for i, j in pairs]
        self._train(model, examples, self.seed + iteration)
        files.publish(f"adapter-{iteration}", model.save_pretrained)
        return model

    def _online(self, model: Any, queries: Sequence[str], files: RunFiles, iteration: int) -> Any:
        from effcore.training.checkpoint import load_tree, save_tree

        pool, judged = files.journal("pool", iteration), files.journal("scores", iteration)
        chosen = files.journal("selected", iteration)
        finished = files.adapter(iteration)
        if finished is not None:
            self.selected.append(len(chosen.rows))
            return self._load(model, finished)
        first, optimizer = 0, None
        state = None if files.path is None else files.path / "online" / "state.safetensors"
        if state is not None and state.is_file():
            held = load_tree(state)
            if held["iteration"] == iteration:
                first = held["done"]
                if held["optimizer"] is not None:
                    model = self._load(model, state.parent)
                    optimizer = self._optimizer(model)
                    optimizer.load_state_dict(held["optimizer"])
        for i in range(first, len(queries)):
            # A query's journal entries may be from before an interruption; the model's state then was the same.
            only = _Only(pool, i), _Only(judged, i)
            seed = self.seed + iteration + 7919 * i
            responses = self.draw(model, [queries[i]], only[0], seed=seed)[0]
            scores = self.judge([queries[i]], [responses], only[1])[0]
            for _, j in self.select([scores]):
                model = self._with_adapter(model)
                optimizer = optimizer or self._optimizer(model)
                torch.manual_seed(self.seed + 7919 * i)  # of the adapters' dropout
                model.train()
                for _ in range(self.online_steps):
                    self._step(model, optimizer, [(queries[i], responses[j])])
                model.eval()
                chosen.add({"query": i, "response": j, "score": scores[j]})
            self._tell("adapting", i + 1, len(queries))
            if (i + 1) % self.generation_batch == 0 and state is not None:
                held = {"iteration": iteration, "done": i + 1, "optimizer": optimizer and optimizer.state_dict()}

                def save(folder: Path, held: dict[str, Any] = held, model: Any = model) -> None:
                    if held["optimizer"] is not None:
                        model.save_pretrained(folder)
                    save_tree(folder / "state.safetensors", held)

                files.publish("online", save)
        self.selected.append(len(chosen.rows))
        if optimizer is not None:
            files.publish(f"adapter-{iteration}", model.save_pretrained)
        return model

    # ---------------------------------------------------------------- training

    def _with_adapter(self, model: Any) -> Any:
        from peft import LoraConfig, PeftModel, get_peft_model

        if isinstance(model, PeftModel):
            return model
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        present = [name for name in self.lora.modules if name in names]
        if not present:
            raise ValueError(f"effcore.VerifierTTT: the model has none of the modules {', '.join(self.lora.modules)}")
        torch.manual_seed(self.seed)  # of the adapters' first matrices
        config = LoraConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora.dropout,
            target_modules=present,
            task_type="CAUSAL_LM",
        )
        self._adapted = get_peft_model(model, config)
        return self._adapted

    def _load(self, model: Any, folder: Path) -> Any:
        from peft import PeftModel, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            if not isinstance(model, PeftModel):
                self._adapted = PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
                return self._adapted
            set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        except SafetensorError as error:
            raise InputError(
                f"{folder}: the adapter is damaged ({error}); delete this folder to train it again"
            ) from error
        return model

    def _take_off(self) -> None:
        """The adapters of the last call leave the model."""
        if self._adapted is not None:
            self._adapted.unload()
            self._adapted = None

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        """Weights, what trains, and modes are what they were where the block raises (a loss that is no number, Ctrl-C)."""
        modes = {module: module.training for module in self.model.modules()}
        trained = {p: p.requires_grad for p in self.model.parameters()}
        held = {p: p.detach().clone() for p, wanted in trained.items() if wanted} if self._has_adapters() else {}
        try:
            yield
        except BaseException:
            self._take_off()
            for module, training in modes.items():
                module.training = training
            for parameter, wanted in trained.items():
                parameter.requires_grad_(wanted).grad = None
            with torch.no_grad():
                for parameter, value in held.items():
                    parameter.copy_(value)
            raise

    def _has_adapters(self) -> bool:
        """Whether the model came with adapters of its own, which are trained on then."""
        from peft import PeftModel

        return isinstance(self.model, PeftModel)

    def _optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.learning_rate)

    def _train(self, model: Any, examples: list[tuple[str, Response]], seed: int) -> None:
        optimizer = self._optimizer(model)
        batches = -(-len(examples) // self.batch_size)
        total = self.epochs * batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / total, 0.0))
        shuffle = random.Random(seed)
        torch.manual_seed(seed)
        model.train()
        for step in range(total):
            if step % batches == 0:
                order = shuffle.sample(range(len(examples)), len(examples))
            at = step % batches * self.batch_size
            self._step(model, optimizer, [examples[i] for i in order[at : at + self.batch_size]])
            schedule.step()
            self._tell("training", step + 1, total)
        model.eval()

    def _step(self, model: Any, optimizer: torch.optim.Optimizer, examples: list[tuple[str, Response]]) -> float:
        device = next(model.parameters()).device
        ids, mask, labels = (tensor.to(device) for tensor in self._batch(examples))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        if not torch.isfinite(loss):
            raise RunError(f"training diverged: the loss is {loss.item()}; lower learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _batch(self, examples: list[tuple[str, Response]]) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask, labels, each int64 [B, S]; labels are −100 on the prompt and on padding."""
        end, rows = self.tokenizer.eos_token_id, []
        for prompt, response in examples:
            before = self.tokenizer(prompt)["input_ids"]
            after = response.tokens + ([end] if response.ended and end is not None else [])
            rows.append((before, after))
        longest = max(len(before) + len(after) for before, after in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (before, after) in enumerate(rows):
            both = torch.tensor(before + after)
            ids[row, : len(both)], mask[row, : len(both)] = both, 1
            labels[row, len(before) : len(both)] = both[len(before) :]
        return ids, mask, labels

    def _config(self, queries: Sequence[str]) -> dict[str, Any]:
        digest = hashlib.sha256("\0".join(queries).encode(errors="surrogatepass")).hexdigest()[:24]
        left_out = {"model", "tokenizer", "verifier", "lora", "run", "listener"}
        settings = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in left_out}
        lora = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.lora).items()}
        return {"queries": digest, **settings, "lora": lora}

    def _tell(self, phase: str, done: int, total: int) -> None:
        if self.listener is not None:
            self.listener(phase, done, total)


class _Only:
    """One query's entry of a journal, under the number 0."""

    def __init__(self, journal: Journal, query: int):
        self.journal, self.query = journal, query

    @property
    def rows(self) -> dict[int, Any]:
        return {0: self.journal.rows[self.query]} if self.query in self.journal.rows else {}

    def add(self, row: dict[str, Any]) -> None:
        self.journal.add({**row, "query": self.query})
