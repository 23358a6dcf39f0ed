"""FlowHN's claim runs, and counts FLOPs as torch does. No speed is judged."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effcore
from benchmarks.claims import _hybrids as hybrids
from benchmarks.claims import flowhn, flowhn_tables
from effcore.methods.flowhn import block_flops, model_flops

LENGTH = 64


def test_blocks_run_at_toy_size(tmp_path):
    assert flowhn.main(["blocks", "--quick", "--rounds", "3", "--json", str(tmp_path / "blocks.json")]) == 0
    assert (tmp_path / "blocks.json").read_text().count('"fac_ratio"') == len(hybrids.STRATEGIES)


def counted(model, queries: int) -> float:
    """Torch's count, less the half of causal attention that nobody sees."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    c = model.config
    return counter.get_total_flops() - c.num_hidden_layers * 2 * queries**2 * c.hidden_size


def test_flops_of_a_llama():
    model = hybrids.other("LLaMA", "toy", LENGTH, "cpu", torch.float32)
    model.set_attn_implementation("eager")  # its products are counted
    assert hybrids.forward_flops(model, LENGTH) == counted(model, LENGTH)


@pytest.mark.parametrize("strategy", hybrids.STRATEGIES)
def test_flops_of_flowhn(strategy):
    model = hybrids.flowhn(strategy, "toy", LENGTH, "cpu", torch.float32)
    assert hybrids.forward_flops(model, LENGTH) == pytest.approx(counted(model, model.config.split), rel=1e-6)


@pytest.mark.parametrize("name", hybrids.OTHERS)
def test_other_models_are_of_equal_size(name):
    with torch.device("meta"):
        goal = hybrids.parameters(effcore.FlowHNForCausalLM(hybrids.config("350M", "fac", 1024)))
    size = hybrids.parameters(hybrids.other(name, "350M", 1024, "meta", torch.bfloat16))
    assert abs(size / goal - 1) < 0.05


def test_splits_cost_about_half():
    configs = {s: hybrids.config("350M", s, 1024) for s in hybrids.STRATEGIES}
    assert block_flops(configs["fac"]) == block_flops(configs["fa"])
    assert 1.9 < block_flops(configs["none"]) / block_flops(configs["fac"]) < 2.1
    assert model_flops(configs["none"]) / model_flops(configs["fac"]) < 1.9  # the head is not split


def test_the_page_holds_the_kept_results():
    text = (flowhn_tables.ROOT / "docs" / "flowhn.md").read_text()
    assert flowhn_tables.fill(text) == text
    emptied = re.sub(r"(<!-- (\w+) -->).*?(<!-- /\2 -->)", r"\1\3", text, flags=re.DOTALL)
    assert emptied != text and flowhn_tables.fill(emptied) == text


def test_kernels_beside_graphs_are_not_traced():
    """What a compiled Jamba layer calls as a kernel runs outside of the compiler; its outputs stay what they are."""
    torch.manual_seed(0)
    model = hybrids.other("Jamba (transformers)", "toy", LENGTH, "cpu", torch.float32).eval()
    ids, seen = torch.arange(8)[None], []

    def watched(*args, kernel=hybrids.modeling_jamba.mamba_selective_scan, **kwargs):
        seen.append(torch.compiler.is_compiling())
        return kernel(*args, **kwargs)

    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with (
            mock.patch.object(hybrids.modeling_jamba, "mamba_selective_scan", watched),
            hybrids.kernels_beside_graphs(),
        ):
            for layer in hybrids.layers_of(model):
                layer.compile(backend="eager")
            found = model(input_ids=ids, use_cache=False).logits
    torch.compiler.reset()
    assert seen and not any(seen)
    torch.testing.assert_close(found, expected)
