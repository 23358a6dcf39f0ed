"""SkipViT on timm's own models, where timm is installed: on the CPU, on a GPU, compiled, in a CUDA graph."""

import copy

import pytest
import torch

import effcore
from effcore.methods import skipvit
from tests.methods.test_skipvit import ByHand, _sharpened, run_blocks

vision_transformer = pytest.importorskip("timm.models.vision_transformer")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
KINDS = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "pooled with class token": {"global_pool": "avg"},
    "qk norm": {"qk_norm": True},
    "layer scale": {"init_values": 0.1},
}


def model(kind="class token", device="cpu"):
    made = vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=6, num_heads=4, num_classes=10, **KINDS[kind]
    )
    return _sharpened(made).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_method_by_hand(kind, device):
    made = model(kind)
    prefix = skipvit.vit_blocks.architecture(made).prefix
    assert prefix == made.num_prefix_tokens
    x = torch.randn(2, 16 + prefix, 64, requires_grad=True)
    gradient = torch.randn_like(x)
    expected = ByHand(made, [(2, 0.55, 4)])(x)
    (expected_dx,) = torch.autograd.grad(expected, x, gradient)
    effcore.skip_tokens(made.to(device), drop=0.55, leave=2, rejoin=4)
    on_device = x.detach().to(device).requires_grad_()
    out = run_blocks(made, on_device)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)
    dx = torch.autograd.grad(out, on_device, gradient.to(device))[0]
    torch.testing.assert_close(dx.cpu(), expected_dx, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_is_the_same(device):
    """Inference on a GPU looks rows up instead of moving them."""
    torch._dynamo.reset()
    made = effcore.skip_tokens(model(device=device), stages=[(1, 0.4, 6), (3, 0.5, 5)])
    compiled = torch.compile(made, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    x = torch.randn(3, 3, 32, 32, device=device)
    with torch.no_grad():
        made.eval()
        torch.testing.assert_close(compiled(x), made(x), rtol=1e-3, atol=1e-4)
    made.train()
    gradients = [torch.autograd.grad(m(x).square().sum(), made.parameters()) for m in (compiled, made)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_changed_in_place_and_back():
    made = model("registers").eval()
    x = torch.randn(2, 3, 32, 32)
    before, state = made(x), list(made.state_dict())
    effcore.skip_tokens(made, leave=2, rejoin=4)
    assert list(made.state_dict()) == state and not torch.allclose(made(x), before)
    (skipped,) = skipvit.skipped_patches(made, x)
    assert skipped.shape == (2, 16) and (skipped.sum(1) == 8).all()
    assert torch.equal(skipvit.keep_all_tokens(made)(x), before)


@pytest.mark.cuda
def test_in_a_cuda_graph():
    made = effcore.skip_tokens(model(device="cuda").eval(), leave=2, rejoin=4)
    x = torch.randn(2, 3, 32, 32, device="cuda")
    with torch.no_grad():
        made(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(out, made(x))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["class token", "pooled"])
def test_mixed_precision_trains(kind):
    made = effcore.skip_tokens(model(kind, "cuda"), leave=2, rejoin=4)
    other = copy.deepcopy(made)
    x = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = made(x)
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())
    assert torch.isfinite(other.bfloat16()(x.bfloat16())).all()
