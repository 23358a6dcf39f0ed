"""FSDP2 on two gloo processes: a model and its optimizer go to files and come back, and the next step is the same."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from effcore.training import checkpoint
from tests.models.tiny import shared_model, tokens
from tests.support import free_port


def sharded(sharing):
    model = shared_model(sharing).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def step(model, optimizer, seed):
    model.zero_grad()
    model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
    optimizer.step()


def parameters(model):
    return {name: parameter.detach().full_tensor().clone() for name, parameter in model.named_parameters()}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for sharing in ("qk", "kv"):
            model, optimizer = sharded(sharing)
            for seed in range(3):
                step(model, optimizer, seed)
            weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            state = checkpoint.gathered_optimizer(model, optimizer)
            if rank == 0:
                shared_model(sharing).save_pretrained(folder / sharing, state_dict=weights)
                checkpoint.save_tree(folder / sharing / "optimizer.safetensors", state)
            dist.barrier()
            step(model, optimizer, 3)
            want = parameters(model)

            model, optimizer = sharded(sharing)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            checkpoint.scatter_model(model, folder / sharing)
            checkpoint.scatter_optimizer(
                model, optimizer, checkpoint.load_tree(folder / sharing / "optimizer.safetensors")
            )
            step(model, optimizer, 3)
            torch.testing.assert_close(parameters(model), want, rtol=0, atol=0)

            # The state matters: without it the step is another one.
            model, optimizer = sharded(sharing)
            checkpoint.scatter_model(model, folder / sharing)
            step(model, optimizer, 3)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(parameters(model), want, rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_round_trip(tmp_path: Path):
    mp.spawn(worker, args=(free_port(), tmp_path), nprocs=2, join=True)
