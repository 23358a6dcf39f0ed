"""Fails where an object compiled for one instruction set defines a symbol that the linker could merge with another's.

A weak definition (an inline function, a template of std) exists once in the library: whichever copy the linker keeps serves
all callers, and baseline code could end up running AVX-512 instructions on a processor that has none.
"""

import subprocess
import sys

# Data that the compiler adds for exceptions, the same in every object.
HARMLESS = {"DW.ref.__gxx_personality_v0"}


def merged_symbols(path: str) -> list[str]:
    lines = subprocess.run(
        ["nm", "--defined-only", path], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    kinds = [line.split()[1:] for line in lines]
    return [name for kind, name in kinds if kind in "WwVvu" and name not in HARMLESS]


def main() -> int:
    bad = {path: symbols for path in sys.argv[1:] if (symbols := merged_symbols(path))}
    for path, symbols in bad.items():
        print(f"{path}: {', '.join(symbols)}")
    print(f"{len(sys.argv) - 1 - len(bad)} passed, {len(bad)} failed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
