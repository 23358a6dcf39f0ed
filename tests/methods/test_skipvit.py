"""SkipViT on Hugging Face's ViT and DeiT and on a timm-like model: against the method written out by hand."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import effcore
from effcore.methods import skipvit
from effcore.methods.skipvit import SkipWarmup
from tests.methods import timm_like

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def hugging_face(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SMALL)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


MODELS = {
    "HF ViT": lambda: hugging_face("ViT"),
    "HF DeiT": lambda: hugging_face("DeiT"),
    "timm": timm_like.VisionTransformer,
    "timm registers": lambda: timm_like.VisionTransformer(reg_tokens=3),
    "timm qk norm": lambda: timm_like.VisionTransformer(qk_norm=True),
    "timm pooled": lambda: timm_like.VisionTransformer(class_token=False, global_pool="avg"),
    "timm pooled with class token": lambda: timm_like.VisionTransformer(global_pool="avg"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return _sharpened(MODELS[request.param]()).train()


def _sharpened(model):
    """Attention far from uniform, so that scores have no near ties."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and ("q" in name.split(".")[-2] or "k_proj" in name):
                p.mul_(4)
    return model


def images(batch=3):
    return torch.randn(batch, 3, 32, 32)


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


class ByHand:
    """The blocks of a model, run on full-size tensors: tokens that are away are put back after each block."""

    def __init__(self, model, stages):
        self.architecture = skipvit.vit_blocks.architecture(model)
        self.blocks = [copy.deepcopy(b) for b in self.architecture.blocks]
        self.stages = stages
        self.kept = []

    def scores(self, block, x):
        p = skipvit.vit_blocks.projections(block)
        x = p.norm(x)
        if p.fused is not None:
            q, k, _ = p.fused(x).chunk(3, -1)
        else:
            q, k = p.query(x), p.key(x)
        q, k = (t.unflatten(-1, (p.heads, -1)).transpose(1, 2) for t in (q, k))
        q, k = (norm(t) if norm is not None else t for norm, t in ((p.q_norm, q), (p.k_norm, k)))
        probs = (q @ k.mT * p.scale).softmax(-1).mean(1)
        return probs[:, 0] if self.architecture.class_token else probs.mean(1)

    def __call__(self, x):
        prefix, present = self.architecture.prefix, []
        here = torch.arange(x.shape[1]).expand(len(x), -1)
        for number, block in enumerate(self.blocks):
            while present and present[-1][1] == number:
                here = present.pop()[0]
            wide = here[:, :, None].expand(-1, -1, x.shape[2])
            sub = x.gather(1, wide)
            scores = self.scores(block, sub)
            x = x.scatter(1, wide, block(sub))
            for leave, drop, rejoin in self.stages:
                if leave - 1 == number:
                    patches = here.shape[1] - prefix
                    order = scores[:, prefix:].argsort(1, descending=True)[:, : patches - int(drop * patches)] + prefix
                    places = torch.cat([torch.arange(prefix).expand(len(x), -1), order], 1).sort(1).values
                    present.append((here, rejoin))
                    here = here.gather(1, places)
                    self.kept.append(here)
        return x


def blocks_of(model):
    return skipvit.vit_blocks.architecture(model).blocks


def run_blocks(model, x):
    for block in blocks_of(model):
        x = block(x)
    return x


@pytest.mark.parametrize(
    "stages",
    [
        [(2, 0.5, 4)],
        [(1, 0.75, 6)],
        [(3, 0.3, 4)],
        [(1, 0.5, 2), (4, 0.5, 6)],
        [(1, 0.4, 6), (3, 0.4, 6)],
        [(1, 0.4, 6), (3, 0.5, 5)],
        [(2, 0.0, 4)],
    ],
    ids=str,
)
def test_equals_the_method_by_hand(model, stages):
    prefix = skipvit.vit_blocks.architecture(model).prefix
    x = torch.randn(2, 16 + prefix, 32, requires_grad=True)
    expected = ByHand(model, stages)(x)
    gradient = torch.randn_like(x)
    (expected_dx,) = torch.autograd.grad(expected, x, gradient)
    effcore.skip_tokens(model, stages=stages)
    out = run_blocks(model, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(out, x, gradient)[0], expected_dx, rtol=1e-4, atol=1e-4)


def test_model_is_changed_in_place_and_back(model):
    before, parameters = logits(model(images_ := images())), list(model.parameters())
    state, classes = model.state_dict(), [type(m) for m in model.modules()]
    assert effcore.skip_tokens(model, leave=2, rejoin=4) is model
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not torch.allclose(logits(model(images_)), before)
    model.load_state_dict(state)
    copied = copy.deepcopy(model)
    for other in (copied, pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other(images_)), logits(model(images_)))
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    effcore.skip_tokens(model, leave=3, rejoin=4, drop=0.2)  # other settings
    assert skipvit.skipping(model).stages == (skipvit.Stage(3, 4, 0.2),)
    skipvit.keep_all_tokens(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(logits(model(images_)), before)
    assert skipvit.skipping(copied).stages == (skipvit.Stage(2, 4, 0.55),)
    other = effcore.skip_tokens(model, leave=2, rejoin=4, inplace=False)
    assert other is not model and torch.equal(logits(model(images_)), before)


def test_inference_and_warmup_switch_it(model):
    images_ = images()
    with torch.no_grad():
        everything = logits(model.eval()(images_))
        effcore.skip_tokens(model, leave=2, rejoin=4)
        assert not torch.allclose(logits(model(images_)), everything)
        skipvit.skipping(model).inference = False
        assert torch.equal(logits(model(images_)), everything)
        assert not torch.allclose(logits(model.train()(images_)), everything)
        warmup = SkipWarmup(steps=2)
        effcore.skip_tokens(model, leave=2, rejoin=4, warmup=warmup)
        seen = []
        for _ in range(4):
            warmup.apply(model)
            seen.append(torch.equal(logits(model(images_)), everything))
        assert seen == [True, True, False, False]


def test_protected_tokens_never_leave():
    model = timm_like.VisionTransformer(reg_tokens=3)
    effcore.skip_tokens(model, drop=0.9, leave=2, rejoin=4)
    trace = skipvit.skipping(model).trace = []
    model(images())
    ((kept, rest),) = trace
    assert (kept[:, :4] == torch.arange(4)).all() and kept.shape == (3, 4 + 2) and rest.shape == (3, 14)
    skipvit.skipping(model).trace = None
    (mask,) = skipvit.skipped_patches(model, images())
    assert mask.shape == (3, 16) and (mask.sum(1) == 14).all()


def test_fewer_flops(model):
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        model(images())
    effcore.skip_tokens(model, drop=0.5, leave=2, rejoin=6, scores="random")
    with torch.no_grad(), FlopCounterMode(display=False) as less:
        model(images())
    assert less.get_total_flops() < 0.8 * full.get_total_flops()


class Calls(TorchFunctionMode):
    """Counts the products with weights and the norms."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, function, types, arguments=(), named_arguments=None):
        self.seen[function.__name__] += 1
        return function(*arguments, **(named_arguments or {}))


def test_scores_compute_no_projection_again(model):
    with Calls() as plain:
        model(images())
    effcore.skip_tokens(model, drop=0.0, leave=2, rejoin=4)
    block = blocks_of(model)[1]
    of_heads = 2 * isinstance(skipvit.vit_blocks.projections(block).q_norm, nn.LayerNorm)
    for _ in range(2):
        with Calls() as scoring:
            model(images())
        assert scoring.seen["linear"] == plain.seen["linear"] > 0
        assert scoring.seen["layer_norm"] == plain.seen["layer_norm"] + of_heads
    assert all(m._shared is None for m in skipvit.vit_blocks.shared_modules(block))


@pytest.mark.parametrize("name", ["HF ViT", "timm"])
def test_two_compiled_graphs_at_most(name):
    torch._dynamo.reset()
    model = _sharpened(MODELS[name]()).train()
    warmup = SkipWarmup(steps=2)
    effcore.skip_tokens(model, leave=2, rejoin=4, warmup=warmup)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for step in range(6):
        x = images()
        warmup.apply(model, step=step)
        warmup.apply(eager, step=step)
        outs = logits(compiled(x)), logits(eager(x))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        gradients = [
            torch.autograd.grad(out.square().sum(), m.parameters(), allow_unused=True)
            for out, m in zip(outs, (model, eager), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0] and graphs[5] == graphs[2] <= 2 * graphs[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_an_exported_model_s_masks_are_not_a_user_s(kind, attention):
    """transformers hands all blocks a mask there, even of no mask."""
    model, x = _sharpened(hugging_face(kind)).eval(), images()
    model.set_attn_implementation(attention)
    effcore.skip_tokens(model, leave=2, rejoin=4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).logits, model(x).logits)
    whole = skipvit.keep_all_tokens(copy.deepcopy(model))
    assert type(whole.base_model) is type(hugging_face(kind).base_model)
    assert not torch.allclose(whole(x).logits, model(x).logits)


def test_a_user_s_mask_is_refused_everywhere():
    model, x = hugging_face("ViT").eval(), images()
    effcore.skip_tokens(model, leave=2, rejoin=4)
    mask = (torch.arange(17) < 9).long().expand(3, -1)
    for call in (
        lambda: model(x, attention_mask=mask),
        lambda: model.vit(x, None, None, mask),
        lambda: torch.export.export(model, (x,), {"attention_mask": mask}),
        lambda: torch.export.export(model.vit, (x, None, None, mask)),
        lambda: torch.compile(model, backend="eager", fullgraph=True)(x, attention_mask=mask),
        lambda: torch.compile(model.vit.layers[1], backend="eager")(x.new_zeros(3, 17, 32), mask[:, None, None].bool()),
    ):
        with pytest.raises(Exception, match="take no attention mask"):
            call()
    skipvit.skipping(model).inference = False
    assert model(x, attention_mask=mask).logits.shape == (3, 10)


@pytest.mark.parametrize("stages", [[(2, 0.5, 4)], [(1, 0.4, 6), (3, 0.5, 5)], [(2, 0.0, 4)]], ids=str)
def test_row_lookups_are_the_same_movement(model, stages, monkeypatch):
    """What compiled inference on a GPU does instead of moving tokens."""
    effcore.skip_tokens(model, stages=stages)
    x = images()
    with torch.no_grad():
        moved = logits(model(x))
        monkeypatch.setattr(skipvit, "_lookups", lambda x: True)
        assert torch.equal(logits(model(x)), moved)


def gradients_of(model, x):
    logits(model(x)).square().sum().backward()
    got = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return got


def test_checkpointing_gives_the_same_gradients():
    model, x = _sharpened(MODELS["HF ViT"]()).train(), images()
    effcore.skip_tokens(model, leave=2, rejoin=4)
    plain = gradients_of(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradients_of(model, x), strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(x)


@pytest.mark.parametrize("name", ["HF ViT", "timm", "timm pooled"])
def test_autocast(name):
    model = effcore.skip_tokens(MODELS[name](), leave=2, rejoin=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = logits(model(images()))
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_can_be_pickled(name):
    model, images = MODELS[name]().eval(), torch.randn(2, 3, 32, 32)
    effcore.skip_tokens(model, drop=0.5, leave=2, rejoin=4)
    again = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    before, after = model(images), again(images)
    assert torch.equal(getattr(before, "logits", before), getattr(after, "logits", after))
    assert type(skipvit.keep_all_tokens(again)) is type(MODELS[name]())


def test_hidden_states_of_hugging_face():
    model = effcore.skip_tokens(MODELS["HF ViT"](), leave=2, rejoin=4)
    out = model(images(), output_hidden_states=True)
    assert len(out.hidden_states) == 7


def test_lora_is_part_of_the_scores():
    peft = pytest.importorskip("peft")
    model = _sharpened(MODELS["HF ViT"]())
    x = torch.randn(2, 17, 32)
    expected = ByHand(model, [(2, 0.5, 4)])(x)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    adapted = peft.get_peft_model(model, config)
    effcore.skip_tokens(adapted.get_base_model(), stages=[(2, 0.5, 4)])
    torch.testing.assert_close(run_blocks(adapted.get_base_model(), x), expected, rtol=1e-4, atol=1e-5)


def test_trainer_callback(tmp_path):
    import transformers

    model = effcore.skip_tokens(MODELS["HF ViT"](), leave=2, rejoin=4, warmup=SkipWarmup(steps=2))
    skip = skipvit.skipping(model)
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(skip.active)

    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[skip.warmup.callback(), Watch()]).train()
    assert seen == [False, False, True, True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"leave": 4, "rejoin": 4}, "leave must be below rejoin, got 4 and 4"),
        ({"leave": 5, "rejoin": 4}, "leave must be below rejoin, got 5 and 4"),
        ({"leave": 0}, "leave must be at least 1"),
        ({"rejoin": 7, "leave": 2}, "rejoin must be at most 6, the number of blocks, got 7"),
        ({"drop": 1.0, "leave": 2, "rejoin": 4}, "drop must be at least 0 and below 1, got 1.0"),
        ({"drop": -0.1, "leave": 2, "rejoin": 4}, "drop must be"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [(1, 0.5, 3), (2, 0.5, 4)]}, "stages overlap: blocks 1 to 3 and 2 to 4"),
        ({"stages": [(1, 0.5, 3), (1, 0.5, 2)]}, "stages overlap"),
        ({"stages": [(1, 0.5, 3), (3, 0.5, 4)]}, "a stage leaves at block 3, where another rejoins"),
        ({"stages": [(1,)]}, r"a stage is \(leave, drop\)"),
        ({"scores": "best", "leave": 2, "rejoin": 4}, "scores must be one of auto, class, mean, random, got 'best'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        effcore.skip_tokens(MODELS["timm"](), **arguments)


def test_other_refusals():
    with pytest.raises(TypeError, match="Linear is not supported; supported are Hugging Face ViT and DeiT"):
        effcore.skip_tokens(nn.Linear(3, 3))
    model = MODELS["timm pooled"]()
    for wrong, message in [
        ({"leave": 2.5}, "leave must be an int, got 2.5"),
        ({"drop": "half"}, "drop must be a number, got 'half'"),
        ({"stages": [3]}, r"a stage is \(leave, drop\) or"),
        ({"warmup": "long"}, "warmup must be a SkipWarmup or a number of steps, got 'long'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            effcore.skip_tokens(MODELS["timm"](), **({"leave": 2, "rejoin": 4} | wrong))
    with pytest.raises(ValueError, match="needs a class token"):
        effcore.skip_tokens(model, leave=2, rejoin=4, scores="class")
    with pytest.raises(ValueError, match="no tokens skip in this VisionTransformer"):
        skipvit.skipping(model)
    effcore.skip_tokens(model, leave=2, rejoin=4)
    with pytest.raises(ValueError, match="no attention mask"):
        run = model.tokens(images())
        for block in model.blocks:
            run = block(run, attn_mask=torch.zeros(16, 16))
    with pytest.raises(ValueError, match="steps must not be negative"):
        SkipWarmup(steps=-1)
    with pytest.raises(ValueError, match=r"apply\(model, epoch=...\)"):
        SkipWarmup(epochs=1).apply(model)
    model.blocks[1] = nn.Identity()
    with pytest.raises(TypeError, match=r"block 1 \(Identity\) is not a pre-norm block"):
        effcore.skip_tokens(model, leave=2, rejoin=4)
