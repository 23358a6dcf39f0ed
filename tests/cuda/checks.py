"""What the programs of this folder that check kernels share: memory full of NaN, compute-sanitizer, the report at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Result = tuple[str, bool, str]  # what was checked, whether it is right, and else why not
TOOLS = ("memcheck", "racecheck")
FOUND = 9  # the exit status of a program in which compute-sanitizer found something


def poison() -> None:
    """Fills the caching allocator's free memory with NaN, so that what a kernel does not write is seen."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return
    large = torch.full((1 << 27,), float("nan"), device="cuda")
    small = [torch.full((1 << 12,), float("nan"), device="cuda") for _ in range(256)]
    del large, small


class Sanitizers:
    """``program --small`` under compute-sanitizer's tools, which look at the kernels whose names contain ``kernels`` alone
    (racecheck reports races in cuBLAS's). A tool runs once for each of ``parts``, further arguments of the program: these
    processes wait for their processors more than for the GPU, so all begin at once, and a check may go on beside them."""

    def __init__(
        self, program: str, kernels: str, parts: Sequence[Sequence[str]] = ((),), tools: Sequence[str] = TOOLS
    ):
        self.runs: list[tuple[str, subprocess.Popen[str] | None]] = []
        uncached = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a tensor's end is not its memory's
        for tool in tools:
            for part in parts:
                command = ["compute-sanitizer", f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=2000",
                           f"--kernel-name=kernel_substring={kernels}", sys.executable, program, "--small", *part]  # fmt: skip
                environment = uncached if tool == "memcheck" else None
                try:
                    run = subprocess.Popen(
                        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
                    )
                except FileNotFoundError:
                    run = None
                self.runs.append((" ".join([tool, *part]), run))

    def results(self, seconds: float = 600) -> list[Result]:
        """Waits, for each process at most so long."""
        return [(name, *self._result(run, seconds)) for name, run in self.runs]

    @staticmethod
    def _result(run: subprocess.Popen[str] | None, seconds: float) -> tuple[bool, str]:
        if run is None:
            return False, "compute-sanitizer is not on PATH"
        try:
            text, _ = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            return False, f"did not end within {seconds:g} s"
        said = [line for line in text.splitlines() if line.startswith("=========")]
        # Without a summary the tool did not come to its end, whatever the program's status is.
        good = run.returncode == 0 and any("SUMMARY: 0" in line for line in said)
        why = "\n".join([*said[:20], *said[20:][-3:]] + ([] if run.returncode in (0, FOUND) else [text[-1500:]]))
        return good, "" if good else why or f"exit status {run.returncode}, and nothing said"


def finish(name: str, results: Sequence[Result], **more: Any) -> int:
    """Writes $OUT/<name>_check.json, if OUT is set, and prints what failed. The program's exit status: 1, too, where nothing
    was checked nor measured."""
    device, failed = torch.cuda.get_device_name(), [r for r in results if not r[1]]
    report = {"device": device, "torch": torch.__version__, "results": results, **more}
    if out := os.environ.get("OUT"):
        Path(out, f"{name}_check.json").write_text(json.dumps(report, indent=1))
    for what, _, why in failed[:30]:
        print("FAILED", what, why[:1000])
    print(f"{len(results)} checks, {len(failed)} failed, on {device}", flush=True)
    return 1 if failed or not (results or any(more.values())) else 0
