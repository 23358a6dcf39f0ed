"""Benchmarks of effcore's op families against the best that PyTorch has: ``python -m benchmarks.run <family>``.

A family is one file, ``benchmarks/ops/bench_<family>.py``, with ``cases(settings)`` and, where calls are worth timing by
themselves, ``calls(settings)``. The rest is shared:

    case.py      what a benchmark is: inputs, our call, the peers' calls, the exact result, the work, the floor
    gate.py      no time is reported for a result that is wrong
    timing.py    alternating runs, cold caches, medians and quartiles, ratios
    quiet.py     whether other processes disturb us
    ceilings.py  what this machine reaches at best: matrix products and copies
    report.py    the table, the JSON, the plot
"""
