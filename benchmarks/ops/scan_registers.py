"""What an instruction of the scan's kind costs a scheduler: `python -m benchmarks.ops.scan_registers` (needs CuPy and a GPU).

Four warps a scheduler run 16 independent chains each. A register file has two banks, and a bank gives one register of a warp a
cycle: a product and sum of three registers takes two cycles, unless a factor is the one that the instruction before read.
Prints a table, and writes $OUT/scan_registers.json, if OUT is set.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.tables import table

BODIES = {
    "a[i] = x[i] y[i] + a[i]": "a[i] = fmaf(x[i], y[i], a[i]);",
    "a[i] = x y[i] + a[i], the same x": "a[i] = fmaf(x[0], y[i], a[i]);",
    "a[i] = a[i] y[i] + 0.3": "a[i] = fmaf(a[i], y[i], 0.3f);",
    "a[i] = a[i] y[i]": "a[i] = a[i] * y[i];",
}
TURNS, CHAINS, REPEATS, WARPS = 256, 16, 4, 4  # warps: of a scheduler
KERNEL = """
extern "C" __global__ void __launch_bounds__(512) kernel(float* out, const float* in, long long* cycles) {
  float a[16], x[16], y[16];
  for (int i = 0; i < 16; ++i) {
    const int at = i * 512 + threadIdx.x;
    a[i] = in[at], x[i] = in[8192 + at], y[i] = in[16384 + at];
  }
  __syncthreads();
  const long long begin = clock64();
  for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
    for (int repeat = 0; repeat < REPEATS; ++repeat) {
#pragma unroll
      for (int i = 0; i < 16; ++i) { BODY }
    }
  }
  const long long end = clock64();
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += a[i];
  out[blockIdx.x * 512 + threadIdx.x] = sum;
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = end - begin;
}
"""


def cycles(body: str) -> float:
    """Of a scheduler, for one instruction of a warp."""
    import cupy

    code = KERNEL.replace("TURNS", str(TURNS)).replace("REPEATS", str(REPEATS)).replace("BODY", body)
    kernel = cupy.RawKernel(code, "kernel")
    values, out = cupy.zeros(3 * 8192, cupy.float32), cupy.empty(132 * 512, cupy.float32)
    found = cupy.empty(1, cupy.int64)
    for _ in range(2):  # the first one loads the code
        kernel((132,), (512,), (out, values, found))
    return int(found[0]) / (TURNS * REPEATS * CHAINS * WARPS)


def main() -> int:
    found = {name: round(cycles(body), 3) for name, body in BODIES.items()}
    print(table(["", "cycles an instruction"], [[name, f"{value:.2f}"] for name, value in found.items()]))
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "scan_registers.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
