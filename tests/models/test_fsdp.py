"""FSDP2 on two gloo processes: the same loss and gradients as the unsharded model, the log-sum-exp in float32."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from effcore.models import layer as layer_module
from tests.models.tiny import assert_same_gradients, gradients, shared_model, tokens
from tests.support import free_port

CASES = [
    (sharing, policy, checkpointing)
    for sharing in ("qk", "qk-blocks", "kv", "kv-projection")
    for policy in (None, "bfloat16")
    for checkpointing in (False, True)
]


def shard(model, policy):
    mixed = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16)} if policy else {}
    for layer in model.model.layers:
        fully_shard(layer, **mixed)
    fully_shard(model, **mixed)
    return model


def step(model, ids):
    model.zero_grad()  # before the forward pass: between the two, FSDP2's root holds other parameters
    loss = model(ids, labels=ids).loss
    return loss.detach().float(), gradients(model, loss)


def watch_scores(seen):
    """Notes the dtype of what every consumer is given."""
    original = layer_module.ops.attention_from_scores

    def watched(scores, v):
        seen.append((scores.lse.dtype, scores.delta.dtype, scores.q.dtype))
        return original(scores, v)

    layer_module.ops.attention_from_scores = watched


def worker(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = []
    watch_scores(seen)
    try:
        for sharing, policy, checkpointing in CASES:
            case = f"{sharing}, {policy}, checkpointing={checkpointing}"
            # Both processes compute the same rows, so the mean over processes is the unsharded gradient.
            ids = tokens()
            plain = shared_model(sharing).train()
            if policy:  # the parameters alone: FSDP leaves RoPE's frequencies in float32
                for p in plain.parameters():
                    p.data = p.data.to(torch.bfloat16)
            model = shard(shared_model(sharing).train(), policy)
            if checkpointing:
                # Both: what is kept for the backward pass (P, or the log-sum-exp under checkpointing) rounds differently.
                model.activation_checkpointing_enable()
                plain.activation_checkpointing_enable()
            want_loss, want = step(plain, ids)
            del seen[:]
            loss, got = step(model, ids)
            if sharing.startswith("qk"):
                dtype = torch.bfloat16 if policy else torch.float32
                assert seen and set(seen) == {(torch.float32, torch.float32, dtype)}, (case, seen)
            else:
                assert not seen
            got = {n: None if g is None else g.full_tensor().float() for n, g in got.items()}
            want = {n: None if g is None else g.float() for n, g in want.items()}
            tolerance = {"rtol": 0, "atol": 0} if policy else {"rtol": 1e-5, "atol": 1e-6}
            want_loss = want_loss.to(torch.bfloat16 if policy else torch.float32).float()  # output_dtype
            torch.testing.assert_close(loss, want_loss, rtol=0, atol=0, msg=lambda m, c=case: f"{c}: {m}")
            assert_same_gradients(got, want, **tolerance)
            # More steps, with longer and shorter regions: no stale gradient, no error for unused parameters.
            if "projection" not in sharing and not policy:
                for layout in (1, 5, 3):
                    model.set_layout(layout)
                    plain.set_layout(layout)
                    got = {n: None if g is None else g.full_tensor() for n, g in step(model, ids)[1].items()}
                    assert_same_gradients(got, step(plain, ids)[1], **tolerance)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_equals_the_unsharded_model():
    mp.spawn(worker, args=(free_port(),), nprocs=2, join=True)
