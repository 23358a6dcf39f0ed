"""SkipViT compiled by Inductor on a GPU: how many graphs it makes, and that they compute the same."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import effcore
from effcore.methods import skipvit
from effcore.methods.skipvit import SkipWarmup
from tests.methods.test_skipvit import MODELS, _sharpened, logits

pytestmark = pytest.mark.cuda


def timm_model(**options):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    return vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=6, num_heads=4, num_classes=10, **options
    )


KINDS = {
    "timm": timm_model,
    "timm registers": lambda: timm_model(reg_tokens=4),
    "timm pooled": lambda: timm_model(class_token=False, global_pool="avg"),
    "HF ViT": MODELS["HF ViT"],
}


def images():
    return torch.randn(3, 3, 32, 32, device="cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_two_compiled_graphs_at_most(kind):
    """Of training through a warm-up, and of inference with and without skipping."""
    torch._dynamo.reset()
    model = _sharpened(KINDS[kind]()).cuda().train()
    warmup = SkipWarmup(steps=2)
    effcore.skip_tokens(model, leave=2, rejoin=4, warmup=warmup)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for step in range(5):
        warmup.apply(model, step=step)
        logits(compiled(images())).square().sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2]
    model.eval()
    for inference in (True, False, True, False):
        skipvit.skipping(model).inference = inference
        x = images()
        with torch.no_grad():
            torch.testing.assert_close(logits(compiled(x)), logits(model(x)), rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 4
