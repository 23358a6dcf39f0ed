"""Decoding steps that cannot be recorded, with stand-ins for CUDA graphs; the others: tests/cuda/test_models_cuda.py."""

import contextlib

import pytest
import torch

from effcore.models import step_graph
from tests.models.test_cache import new_cache, shared_model, tokens


class Refusing:
    """A graph in which nothing can be recorded."""

    def capture_begin(self, **_):
        raise RuntimeError("operation not permitted when stream is capturing")


class Stream:
    def __init__(self, device):
        self.device = device

    def wait_stream(self, other):
        pass


@torch.no_grad()
def test_a_step_that_cannot_be_recorded_is_done_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    model, ids = shared_model("qk"), tokens()
    expected = model(ids, use_cache=False).logits
    cache, graph = new_cache(model, True), step_graph.StepGraph()
    model(ids[:, :4], past_key_values=cache)
    with pytest.warns(UserWarning, match="cannot be recorded.*not permitted"):
        first = graph.step(model, cache, {"input_ids": ids[:, 4:5]})
    torch.testing.assert_close(first[:, 0], expected[:, 4])
    for i in (5, 6):  # said once
        torch.testing.assert_close(graph.step(model, cache, {"input_ids": ids[:, i : i + 1]})[:, 0], expected[:, i])
    assert cache.get_seq_length() == 7
