"""Two gloo processes record half of the samples each and draw what one process would have drawn."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import effcore
from tests.methods.test_swiftlearn import Items
from tests.support import free_port

CASES = [
    {},
    {"select": "topk"},
    {"refresh_every": 1, "refresh": "visited"},
    {"refresh_every": 2},
    {"recording": "evaluation"},
]


def answers(batch, step):
    """What a model says: depends on the sample and on how far training is, not on who asks."""
    return batch["x"][:, :2] * (1 + step // 12)


def drawn(options, steps=None, state=None):
    """The orders of all drawn epochs, what this process visited, and the state after ``steps``."""
    data = Items()
    sampler = effcore.SwiftLearnSampler(data, 0.3, epochs=5, **options)
    if state is not None:
        sampler.load_state_dict(state)
    epoch = lambda: len(visited) // 12  # noqa: E731
    visited = []
    per_process = 4 if dist.is_initialized() else 8
    forward = lambda batch: batch["x"][:, 2:] * (1 + epoch())  # noqa: E731
    for ids, batch in sampler.batches(data, per_process, forward=forward):
        sampler.record(ids, answers(batch, len(visited)))
        visited.append(ids)
        if len(visited) == steps:
            break
    orders = {e: sampler.order(e).tolist() for e in range(2, 5)} if steps is None else None
    return orders, visited, sampler.state_dict()


def worker(rank, port, expected):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for options, want in zip(CASES, expected, strict=True):
            orders, visited, state = drawn(options)
            assert orders == want, options
            # Between them the processes visit everything, and each its own part.
            everyone = [None, None]
            dist.all_gather_object(everyone, torch.cat(visited[:12]).tolist())
            assert len(everyone[0]) == len(everyone[1]) == 45 and set(everyone[0]) | set(everyone[1]) == set(range(90))
            # A state taken in the middle of the second epoch holds what both have recorded.
            first = drawn(options, steps=17)[2]
            assert first["recordings"].sum() >= 90 + 5 * 8 or options
            both = [None, None]
            dist.all_gather_object(both, (state["change"].nan_to_num(-1).tolist(), first["recordings"].tolist()))
            assert both[0] == both[1]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_draw_what_one_draws():
    expected = [drawn(options)[0] for options in CASES]
    mp.spawn(worker, args=(free_port(), expected), nprocs=2, join=True)
