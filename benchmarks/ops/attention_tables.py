"""Fills the tables on attention in the docs from the kept results: `python -m benchmarks.ops.attention_tables`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ops._cuda_peers import PEERS
from benchmarks.tables import put, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


DEVICES = ("h200", "h100")


def _report(name: str, device: str) -> dict[str, Any]:
    path = RESULTS / f"{name}_{device}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def _shapes(rows: list[dict]) -> list[tuple[int, int]]:
    return sorted({(row["dim"], row["length"]) for row in rows if "dim" in row})


def _row(rows: list[dict], what: str, dim: int, length: int) -> dict | None:
    found = (row for row in rows if (row["what"], row.get("dim"), row.get("length")) == (what, dim, length))
    return next(found, None)


def _peers(device: str) -> str:
    """TFLOP/s of a layer that shares nothing, and their share of a large matrix product's."""
    report = _report("attention_cuda_peers", device)
    rows = report["rows"]
    theirs = [name for name in PEERS if any(name in row.get("tflops", ()) for row in rows)]
    names = ["effcore", *theirs]
    lines = []
    for what in ("forward", "forward+backward"):
        for dim, length in _shapes(rows):
            if row := _row(rows, what, dim, length):
                speeds = (row["tflops"].get(name) for name in names)
                cells = ["" if x is None else f"{x:.0f} ({x / report['matmul_tflops']:.0%})" for x in speeds]
                lines.append([f"{what}, {dim}, {length}", *cells])
    return table(["head_dim, S", "effcore", *(f"SDPA {n}" if n in ("flash", "cudnn") else n for n in theirs)], lines)


def _ratios(row: dict | None, of: str = "ratio_to_best_peer") -> str:
    return "" if row is None else " / ".join(f"{x:.2f}" for x in row[of].values())


def _sharing(device: str) -> str:
    """How many times as fast as the fastest peer's full layers: single layers of a group, from lse / with P kept."""
    rows = _report("attention_cuda_peers", device)["rows"]
    kinds = ["consumer forward", "consumer backward", "group of 4 backward"]
    lines = []
    for dim, length in _shapes(rows):
        forward, *others = (_row(rows, what, dim, length) for what in kinds)
        assert forward is not None
        lines.append([f"{dim}, {length}", *map(_ratios, (forward, *others)), _ratios(forward, "of_limit")])
    header = ["head_dim, S", "consumer's forward", "consumer's backward", "backward of a group of 4, against four"]
    return table([*header, "consumer's forward: of the limit"], lines)


def _groups(device: str) -> str:
    """The same of groups, forward and backward through autograd."""
    rows = _report("attention_cuda_groups", device)["rows"]
    kinds = [what for what in dict.fromkeys(row["what"] for row in rows) if what != "backward"]
    kinds.sort(key=lambda what: (what.startswith("KV"), int(what.split()[-1])))  # "QK group of 4"
    lines = [
        [f"{dim}, {length}", *(_ratios(_row(rows, kind, dim, length)) for kind in [*kinds, "backward"])]
        for dim, length in _shapes(rows)
    ]
    return table(["head_dim, S", *kinds, "one layer's backward"], lines)


def _decode(device: str) -> str:
    rows = [row for row in _report("attention_cuda_peers", device)["rows"] if row["what"].startswith("decode")]
    lines = []
    for row in rows:
        ms, speed = row["ms"], row["of_copy"]
        cells = [f"{1e3 * ms[n]:.0f} µs, {speed[n]:.2f}" if n in ms else "" for n in ("decode", "cudnn", "flash")]
        cells += [f"{row['ratio_to_best_peer']:.2f}", f"{ms['decode'] / ms['from probs']:.2f}"]
        lines.append([row["what"].removeprefix("decode "), *cells])
    names = ["effcore", "SDPA cudnn", "SDPA flash", "best peer's time over ours", "a consumer, times as fast"]
    return table(["batch, heads, keys, head_dim", *names], lines)


def _speed(parts: list[tuple[str, list[dict]]]) -> str:
    """What sharing brings a whole model: a line for each setting, of rows the first of which is the compiled model's."""
    lines = []
    for what, rows in parts:
        by_name = {row["model"]: row for row in rows}
        plain = next((row for name, row in by_name.items() if name.startswith("compiled")), None)
        ours = next((row for row in rows if "ratio_to_control" in row and " share " in row["model"]), None)
        if plain is None or ours is None:
            continue
        cells = [f"{row['tokens/s']:,.0f}" for row in (plain, by_name["effcore, nothing shared"], ours)]
        what += "*" if ours.get("earlier_build") else ""
        lines.append([what, *cells, f"{ours['ratio']:.3f}", f"{ours['ratio_to_control']:.3f}"])
    names = ["compiled, SDPA", "effcore, nothing shared", "sharing", "against the compiled model"]
    return table(["tokens a second", *names, "against nothing shared"], lines)


def _epas() -> str:
    train, decode = (_report(name, "h200")["rows"] for name in ("epas_train", "epas_decode"))
    parts = [
        (f"training, {length} tokens, {2048 // dim} heads of {dim}", [row for row in train if row["length"] == length])
        for length, dim in sorted({(row["length"], row["head_dim"]) for row in train})
    ]
    parts += [(f"decoding behind {row['context']} tokens, batch {row['batch']}", decode) for row in decode[:1]]
    return _speed(parts)


def _echo() -> str:
    prefill, train = (_report(name, "h200")["rows"] for name in ("echo_prefill", "echo_train"))
    parts = [
        (f"first token of {length}, {heads} heads", [row for row in prefill if row["heads"] == heads])
        for heads, length in sorted({(row["heads"], row["length"]) for row in prefill}, reverse=True)
    ]
    parts += [(f"training, {row['length']} tokens", train) for row in train[:1]]
    return _speed(parts)


def _profile(claim: str) -> str:
    rows = [(row["model"], row["microseconds"]) for row in _report(f"epas_profile_{claim}", "h200")["rows"]]
    steps = [found["kinds"] | {"nothing runs": found["idle"]} for _, found in rows]
    kinds = [kind for kind in steps[0] if any(step[kind] >= 1.5 for step in steps)] if steps else []
    lines = [[kind, *(f"{step[kind]:,.0f}" for step in steps)] for kind in kinds]
    return table(["", *(name for name, _ in rows)], [*lines, ["in all", *(f"{sum(x.values()):,.0f}" for x in steps)]])


_OF_A_DEVICE = {
    "attention_peers": _peers,
    "attention_sharing": _sharing,
    "attention_groups": _groups,
    "attention_decode": _decode,
}
TABLES: dict[str, Callable[[], str]] = {
    f"{name}_{device}": partial(make, device) for name, make in _OF_A_DEVICE.items() for device in DEVICES
}
TABLES |= {f"epas_profile_{claim}": partial(_profile, claim) for claim in ("train", "decode")}
TABLES |= {"epas_speed": _epas, "echo_speed": _echo}
PAGES = ("attention-speed.md", "epas.md", "echo-llama.md")


def fill(text: str) -> str:
    for name, make in TABLES.items():
        text = put(text, name, make())
    return text


def main() -> int:
    for name in PAGES:
        page = ROOT / "docs" / name
        page.write_text(fill(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
