"""The Laplace posterior over experts of transformers' models, linear experts and adapters, against autograd."""

import pytest
import torch
from torch import nn

from effcore.errors import InputError
from effcore.methods.bayesian_moe import Posterior, laplace
from effcore.methods.laplace_taps import find_taps, listening, logits_of
from effcore.reference.kronecker import dense_factor
from tests.methods.laplace_toys import ANSWERS, moe, text, toy


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "deepseek"])
def test_our_experts_give_the_model_s_own_logits(kind):
    model, batch = moe(kind), text()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model(**inputs).logits
        with listening(model, find_taps(model, "experts")):
            ours = model(**inputs).logits
        after = model(**inputs).logits
    torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(before, after)
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._experts_implementation != "effcore_laplace"


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "deepseek"])
@pytest.mark.parametrize("hessian", ["kron", "lowrank", "diag"])
def test_covariance_of_logits_equals_autograd_s(kind, hessian):
    """The Jacobian by each expert's matrix from autograd, one logit at a time, and the dense posterior covariance."""
    model = moe(kind, torch.float64)
    posterior = laplace(
        model, [text(seed=s) for s in range(3)], hessian=hessian, rank=3, answers=ANSWERS, prior_variance=0.2
    )
    batch = text(seed=8)
    mean, covariance = posterior.logit_distribution(batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    last = batch["attention_mask"].sum(1) - 1
    logits = model(**inputs).logits[torch.arange(4), last][:, ANSWERS]
    torch.testing.assert_close(mean, logits.detach(), rtol=1e-6, atol=1e-8, check_dtype=False)
    weights = [layer.tap.weight for layer in posterior.layers]
    for b in range(4):
        jacobians = [torch.autograd.grad(logits[b, c], weights, retain_graph=True) for c in range(3)]
        exact = torch.zeros(3, 3, dtype=torch.float64)
        for i, layer in enumerate(posterior.layers):
            for e in range(layer.tap.experts):
                vec = torch.stack([j[i][e].mT.flatten() for j in jacobians])
                if hessian == "diag":
                    curvature = layer.diagonal[e].mT.flatten().diag()
                else:
                    a, g = (dense_factor(*f)[e] for f in layer.factors)
                    curvature = torch.kron(a, g)
                precision = curvature + torch.eye(len(curvature), dtype=torch.float64) / 0.2
                exact += vec @ torch.linalg.solve(precision, vec.mT)
        torch.testing.assert_close(covariance[b].double(), exact, rtol=1e-5, atol=1e-8)


def test_the_fisher_of_an_expert_equals_the_sum_over_its_tokens():
    """Token by token, with hooks of nobody: y = model's own distribution over the answers."""
    model, batch = moe("qwen2", torch.float64), text()
    posterior = laplace(model, [batch], hessian="kron", answers=ANSWERS)
    layer = posterior.layers[-1]  # of the last layer only the answer's token counts
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    experts = layer.tap.module
    seen = {}

    def hook(module, arguments):
        seen["x"], seen["index"], seen["weight"] = arguments

    handle = experts.register_forward_pre_hook(hook)
    logits = model(**inputs).logits[torch.arange(4), batch["attention_mask"].sum(1) - 1][:, ANSWERS]
    handle.remove()
    assert layer.tokens.sum() == 4 * 2
    e = int(layer.tokens.argmax())
    (grad,) = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), experts.down_proj)
    last = torch.arange(4) * 9 + batch["attention_mask"].sum(1) - 1
    rows = [t for t in last.tolist() if e in seen["index"][t].tolist()]
    assert len(rows) == int(layer.tokens[e])
    gate, up = (seen["x"][rows] @ experts.gate_up_proj[e].mT).chunk(2, -1)
    a = experts.act_fn(gate) * up
    torch.testing.assert_close(dense_factor(*layer.factors[0])[e], (a.mT @ a).detach())
    # The gradient by the matrix has its columns in what the inputs span: the same tokens, no others.
    outside = torch.eye(12, dtype=torch.float64) - torch.linalg.pinv(a.detach()) @ a.detach()
    assert (grad[e] @ outside).abs().max() < 1e-9 * max(1.0, grad[e].abs().max().item())


def test_batches_and_padding_do_not_matter():
    model = moe("mixtral", torch.float64)
    batch = text(rows=6)
    whole = laplace(model, [batch], hessian="kron", answers=ANSWERS)
    pieces = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(6)]
    for piece in pieces:  # no padding at all
        n = int(piece["attention_mask"].sum())
        piece["input_ids"], piece["attention_mask"] = piece["input_ids"][:, :n], piece["attention_mask"][:, :n]
    single = laplace(model, pieces, hessian="kron", answers=ANSWERS)
    for a, b in zip(whole.layers, single.layers, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        for f, g in zip(a.factors, b.factors, strict=True):
            torch.testing.assert_close(dense_factor(*f), dense_factor(*g))


class LinearExperts(nn.Module):
    """Experts as a ModuleList, their tokens gathered by hand."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 6), "w2": nn.Linear(6, 4)}) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):  # [B, S, 4]
        flat = x.reshape(-1, 4)
        weight, index = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows = (index == e).nonzero()[:, 0]
            y = expert["w2"](torch.tanh(expert["w1"](flat[rows]))) * weight[rows, None]
            out = out.index_add(0, rows, y)
        return self.head(out.view_as(x).mean(1))


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "deepseek"])
def test_low_rank_at_full_rank_equals_kron_where_tokens_are_few(kind):
    """Directions that no token of an expert has keep the prior variance."""
    model, loader = moe(kind, torch.float64), [text(seed=s) for s in range(3)]
    full = laplace(model, loader, answers=ANSWERS, hessian="kron", prior_variance=0.1)
    low = laplace(model, loader, answers=ANSWERS, hessian="lowrank", rank=16, prior_variance=0.1)
    torch.testing.assert_close(
        low.logit_distribution(loader[0]), full.logit_distribution(loader[0]), rtol=1e-6, atol=1e-9
    )


def test_linear_experts():
    torch.manual_seed(0)
    model = LinearExperts().double()
    x, y = torch.randn(5, 7, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    posterior = laplace(model, [(x, y)], hessian="kron", prior_variance=0.5)
    assert [t.name for t in posterior.taps] == [f"experts.{e}.w2" for e in range(3)]
    _, covariance = posterior.logit_distribution((x,))
    logits = model(x)
    weights = [layer.tap.weight for layer in posterior.layers]
    for b in range(5):
        jacobians = [torch.autograd.grad(logits[b, c], weights, retain_graph=True) for c in range(3)]
        exact = torch.zeros(3, 3, dtype=torch.float64)
        for i, layer in enumerate(posterior.layers):
            vec = torch.stack([j[i].mT.flatten() for j in jacobians])
            curvature = torch.kron(*(dense_factor(*f)[0] for f in layer.factors))
            precision = curvature + torch.eye(24, dtype=torch.float64) * 2
            exact += vec @ torch.linalg.solve(precision, vec.mT)
        torch.testing.assert_close(covariance[b], exact)


def test_lora_adapters():
    peft = pytest.importorskip("peft")
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = peft.get_peft_model(
        hf.LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    posterior = laplace(model, [text()], targets="lora", hessian="lowrank", rank=6, answers=ANSWERS)
    assert len(posterior.layers) == 4
    assert posterior.predict(text()).sum(1).allclose(torch.ones(4))


def test_save_and_load(tmp_path):
    model, batch = moe("qwen2"), text()
    for hessian in ("lowrank", "diag"):
        posterior = laplace(model, [batch], hessian=hessian, rank=3, answers=ANSWERS, prior_mean="zero")
        posterior.save(tmp_path / "posterior.safetensors")
        again = Posterior.load(tmp_path / "posterior.safetensors", model)
        assert torch.equal(posterior.predict(batch), again.predict(batch))
        assert torch.equal(posterior.log_evidence(), again.log_evidence())
        sample = again.sample(seed=1)
        assert all(sample[k].shape == dict(model.named_parameters())[k].shape for k in sample)
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.safetensors"]
    with pytest.raises(InputError, match="no module of the model"):
        Posterior.load(tmp_path / "posterior.safetensors", toy())


def test_logits_of_last_tokens_alone():
    """Padded rows: only the columns where some row ends go through the output layer, and each row finds its own."""
    model, batch = moe("qwen2"), text()
    with torch.no_grad():
        everything = model(batch["input_ids"], batch["attention_mask"]).logits
    widths = []
    hook = model.lm_head.register_forward_hook(lambda _m, _inputs, out: widths.append(out.shape[1]))
    logits = logits_of(model, batch, torch.tensor(ANSWERS))
    hook.remove()
    ends = batch["attention_mask"].sum(1) - 1
    assert widths == [len(ends.unique())] and widths[0] < everything.shape[1]
    torch.testing.assert_close(logits, everything[torch.arange(len(ends)), ends][:, ANSWERS])
