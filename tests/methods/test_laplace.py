"""The Laplace posterior on small models: against dense algebra, against laplace-torch, on transformers' experts, and
refusals."""

import copy

import pytest
import torch
from torch import nn

from effcore.errors import InputError
from effcore.methods.bayesian_moe import Posterior, laplace
from effcore.methods.laplace_taps import find_taps, listening
from effcore.reference.kronecker import dense_factor

torch.manual_seed(0)


def toy(dtype=torch.float64, inputs=3, hidden=5, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes, bias=False)).to(dtype)


def data(count=24, inputs=3, classes=4, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.randn(count, inputs, dtype=dtype), torch.randint(0, classes, (count,))


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def last_layer_jacobian(model, x):
    """[B, C, C · I] by the column-major vec of the last layer's weight."""
    features = model[:-1](x).detach()
    classes = model[-1].out_features
    # ∂ logit_c / ∂ W[o, i] = (o == c) features[i]; vec column-major: index i · O + o
    return torch.einsum("bi,co->bcio", features, torch.eye(classes, dtype=x.dtype)).flatten(2)


def dense_precision(model, x, variance):
    """I / s² + (Σ a aᵀ) ⊗ (Σ E[g gᵀ]) / N for the last layer."""
    features, p = model[:-1](x).detach(), model(x).detach().softmax(-1)
    a = features.mT @ features
    g = p.sum(0).diag() - p.mT @ p
    kron = torch.kron(a, g) / len(x)
    return torch.eye(len(kron), dtype=x.dtype) / variance + kron


@pytest.mark.parametrize("size", [24, 7])
def test_last_layer_equals_dense_algebra(size):
    model, (x, y) = toy(), data()
    posterior = laplace(
        model, batches(x, y, size), targets="last", hessian="kron", prior_mean="zero", prior_variance=0.3
    )
    precision = dense_precision(model, x, 0.3)
    jacobian = last_layer_jacobian(model, x)
    mean, covariance = posterior.logit_distribution((x,))
    torch.testing.assert_close(mean, model(x).detach())
    torch.testing.assert_close(covariance, jacobian @ torch.linalg.inv(precision) @ jacobian.mT)
    weights = model[-1].weight.detach()
    likelihood = model(x).log_softmax(-1).gather(1, y[:, None]).sum().item()
    exact = likelihood - weights.square().sum() / 0.6 - torch.logdet(0.3 * precision) / 2
    torch.testing.assert_close(posterior.log_evidence(), exact.detach(), check_dtype=False)
    assert posterior.log_likelihood == pytest.approx(likelihood)


def test_low_rank_at_full_rank_equals_kron():
    model, (x, y) = toy(), data()
    full = laplace(model, batches(x, y, 5), targets="last", hessian="kron", prior_mean="zero")
    low = laplace(model, batches(x, y, 5), targets="last", hessian="lowrank", rank=5, prior_mean="zero")
    for a, b in zip(full.logit_distribution((x,)), low.logit_distribution((x,)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(full.log_evidence(), low.log_evidence())


def test_low_rank_keeps_the_trace_of_both_factors():
    model, (x, y) = toy(hidden=9), data()
    full = laplace(model, batches(x, y, 5), targets="last", hessian="kron").layers[0]
    low = laplace(model, batches(x, y, 5), targets="last", hessian="lowrank", rank=2).layers[0]
    for a, b in zip(full.factors, low.factors, strict=True):
        dense = dense_factor(*a), dense_factor(*b)
        torch.testing.assert_close(*(m.diagonal(dim1=1, dim2=2).sum() for m in dense))


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_fisher_of_the_model_s_own_labels(fisher):
    """The sampled Fisher approaches the exact one; the labels of the data play no part."""
    model, (x, y) = toy(), data()
    exact = laplace(model, [(x, y)], targets="last", hessian="kron").layers[0].factors[1]
    other = laplace(
        model, [(x, (y + 1) % 4)] * (1 if fisher == "exact" else 400), targets="last", hessian="kron", fisher=fisher
    )
    dense = dense_factor(*other.layers[0].factors[1])
    torch.testing.assert_close(dense, dense_factor(*exact), rtol=0, atol=1e-9 if fisher == "exact" else 0.01)


def test_samples_have_the_posterior_s_covariance():
    model, (x, y) = toy(inputs=2, hidden=3, classes=2), data(inputs=2, classes=2)
    for hessian, rank in (("kron", 1), ("lowrank", 1), ("diag", 1)):
        posterior = laplace(model, [(x, y)], targets="last", hessian=hessian, rank=rank, prior_variance=2.0)
        layer = posterior.layers[0]
        if hessian == "diag":
            exact = torch.diag(1 / (0.5 + layer.diagonal[0].mT.flatten()))
        else:
            dense = [dense_factor(*f)[0] for f in layer.factors]
            exact = torch.linalg.inv(torch.kron(*dense) + torch.eye(6, dtype=torch.float64) / 2)
        generator = torch.Generator().manual_seed(0)
        s = posterior.prior_variance[0]
        draws = torch.stack([layer.sample(s, generator).mT.flatten() for _ in range(8000)])
        torch.testing.assert_close(draws.T.cov(), exact, rtol=0.1, atol=0.06)
        torch.testing.assert_close(draws.mean(0), model[-1].weight.detach().mT.flatten(), rtol=0, atol=0.06)


def test_the_evidence_s_gradient_is_that_of_finite_differences():
    model, (x, y) = toy(), data()
    posterior = laplace(model, batches(x, y, 5), targets="last", rank=2, prior_mean="zero")
    for value in (0.01, 0.5, 20.0):
        log_s = torch.tensor(value, dtype=torch.float64).log().requires_grad_()
        posterior.log_evidence(log_s.exp()).backward()
        step = 1e-5
        low, high = (posterior.log_evidence((log_s.detach() + d).exp()) for d in (-step, step))
        torch.testing.assert_close(log_s.grad, (high - low) / (2 * step), rtol=1e-5, atol=1e-6)


def test_evidence_chooses_its_maximum():
    model, (x, y) = toy(), data()
    posterior = laplace(model, batches(x, y, 5), targets="last", rank=2, prior_mean="zero").fit_evidence()
    best = posterior.prior_variance[0]
    here = posterior.log_evidence()
    assert here >= posterior.log_evidence(best * 1.1) and here >= posterior.log_evidence(best / 1.1)


def test_heldout_tuning_is_no_worse_than_any_of_its_grid():
    model, (x, y) = toy(), data()
    held = data(seed=9)
    posterior = laplace(model, batches(x, y, 5), targets="last", rank=2)

    def nll(variance):
        posterior.prior_variance.fill_(variance)
        return -posterior.predict(held, samples=256).gather(1, held[1][:, None]).log().mean()

    grid = [1e-3, 1e-1, 1.0, 10.0]
    best = posterior.fit_heldout([held], grid=grid).prior_variance[0].item()
    assert best in grid
    assert nll(best) <= min(nll(g) for g in grid) + 1e-6
    # It stays the MAP's when the prior has no width.
    posterior.prior_variance.fill_(1e-12)
    torch.testing.assert_close(
        posterior.predict(held, samples=2000), model(held[0]).detach().softmax(-1), rtol=0, atol=1e-3
    )


def test_prediction_averages_the_softmax():
    model, (x, y) = toy(), data()
    posterior = laplace(model, [(x, y)], targets="last", hessian="kron", prior_variance=5.0)
    mean, covariance = posterior.logit_distribution((x,))
    draws = torch.distributions.MultivariateNormal(mean, covariance + 1e-9 * torch.eye(4)).sample((20_000,))
    torch.testing.assert_close(posterior.predict((x,), samples=20_000), draws.softmax(-1).mean(0), rtol=0, atol=0.01)
    assert not torch.allclose(draws.mean(0).softmax(-1), draws.softmax(-1).mean(0), atol=0.02)
    probit = posterior.predict((x,), method="probit")
    assert (probit.max(1).values < mean.softmax(-1).max(1).values).all()


# ---------------------------------------------------------------- laplace-torch


@pytest.mark.parametrize("variance", [0.05, 1.0])
def test_agrees_with_laplace_torch(variance):
    other = pytest.importorskip("laplace")
    from laplace.curvature import CurvlinopsGGN

    model, (x, y) = toy(torch.float32), data(dtype=torch.float32)
    posterior = laplace(model, [(x, y)], targets="last", hessian="kron", prior_mean="zero", prior_variance=variance)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    theirs = other.Laplace(
        copy.deepcopy(model), "classification", subset_of_weights="last_layer", hessian_structure="kron",
        prior_precision=1 / variance, backend=CurvlinopsGGN,
    )  # fmt: skip
    theirs.fit(loader)
    mean, covariance = theirs._glm_predictive_distribution(x)
    ours = posterior.logit_distribution((x,))
    torch.testing.assert_close(ours[0], mean.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], covariance.detach(), rtol=1e-4, atol=1e-5)
    evidence = theirs.log_marginal_likelihood().item()
    assert posterior.log_evidence().item() == pytest.approx(evidence, rel=1e-4)


# ---------------------------------------------------------------- transformers' experts


def moe(kind, dtype=torch.float32, seed=0):
    import transformers as hf

    torch.manual_seed(seed)
    common = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "qwen2":
        config = hf.Qwen2MoeConfig(
            **common, num_experts=5, moe_intermediate_size=12, intermediate_size=24, shared_expert_intermediate_size=12
        )
        model = hf.Qwen2MoeForCausalLM(config)
    elif kind == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**common, num_local_experts=4, intermediate_size=12))
    else:
        config = hf.DeepseekV3Config(
            **common, n_routed_experts=4, moe_intermediate_size=12, intermediate_size=24, n_shared_experts=1, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8,
        )  # fmt: skip
        model = hf.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.3)
    model.set_experts_implementation("eager")  # the one that takes float64
    return model.to(dtype).eval()


def text(rows=4, length=9, padded=True, seed=3):
    torch.manual_seed(seed)
    ids, mask = torch.randint(0, 40, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    if padded:
        for row, n in enumerate(torch.randint(4, length + 1, (rows,)).tolist()):
            mask[row, n:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (rows,))}


ANSWERS = [3, 7, 11]


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


# ---------------------------------------------------------------- interruption


def interrupted(loader, after):
    for number, batch in enumerate(loader):
        if number == after:
            raise KeyboardInterrupt
        yield batch


def test_an_interrupted_fit_goes_on(tmp_path):
    model, loader = moe("mixtral"), [text(seed=s) for s in range(7)]
    arguments = {"rank": 3, "answers": ANSWERS, "prior_mean": "zero", "fisher": "sampled"}
    whole = laplace(model, loader, **arguments)
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        laplace(model, interrupted(loader, 5), **arguments, checkpoint=path, checkpoint_every=2)
    done = []
    resumed = laplace(
        model,
        loader,
        **arguments,
        checkpoint=path,
        checkpoint_every=2,
        progress=lambda n, total: done.append((n, total)),
    )
    assert done == [(5, 7), (6, 7), (7, 7)] and not path.exists()
    assert torch.equal(whole.predict(loader[0]), resumed.predict(loader[0]))
    assert torch.equal(whole.log_evidence(), resumed.log_evidence())


def test_a_loader_that_shuffles_between_passes_is_refused(tmp_path):
    model, loader = moe("mixtral"), [text(seed=s) for s in range(6)]
    path = tmp_path / "fit.safetensors"
    arguments = {"rank": 3, "answers": ANSWERS, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        laplace(model, interrupted(loader, 4), **arguments)
    kept = path.read_bytes()
    with pytest.raises(InputError, match="other batches than those of the interrupted fit; does it shuffle"):
        laplace(model, loader[::-1], **arguments)
    with pytest.raises(InputError, match="had seen 4 batches, but the loader has 2"):
        laplace(model, loader[:2], **arguments)
    with pytest.raises(InputError, match="other settings"):
        laplace(model, loader, **(arguments | {"rank": 4}))
    assert path.read_bytes() == kept


# ---------------------------------------------------------------- refusals


def test_experts_that_no_token_reached_are_reported_and_keep_the_prior():
    model = moe("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[4] = 0
            layer.mlp.gate.weight[:4].normal_(0, 50)
    posterior = laplace(model, [text(rows=2, length=5)], hessian="kron", answers=ANSWERS, prior_variance=0.5)
    assert posterior.unrouted
    layer = posterior.layers[0]
    (name, experts), *_ = posterior.unrouted.items()
    layer = next(l for l in posterior.layers if l.tap.name == name)
    draws = torch.stack(
        [layer.sample(torch.tensor(0.5), torch.Generator().manual_seed(s))[experts[0]] for s in range(300)]
    )
    assert draws.var(0).mean() == pytest.approx(0.5, rel=0.05)


def test_nan_gradients_leave_nothing_behind(tmp_path):
    model, loader = moe("mixtral"), [text(seed=s) for s in range(4)]
    path = tmp_path / "fit.safetensors"

    def broken():
        for number, batch in enumerate(loader):
            if number == 3:
                with torch.no_grad():
                    model.model.layers[0].mlp.experts.down_proj[:, 0, 0] = float("nan")
            yield batch

    with pytest.raises(InputError, match=r"NaN or infinite gradients at model\.layers\.0.* in batch 3"):
        laplace(model, broken(), rank=3, answers=ANSWERS, checkpoint=path, checkpoint_every=1)
    from safetensors.torch import load_file

    assert all(torch.isfinite(t.double()).all() for t in load_file(path).values())
    assert all(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())


X, Y = data()
REFUSED = {
    "empty loader": (lambda: laplace(toy(), [], targets="last", rank=2), "the loader is empty"),
    "no experts": (lambda: laplace(toy(), [(X, Y)]), "Sequential has no experts"),
    "no adapters": (lambda: laplace(toy(), [(X, Y)], targets="lora"), "has no LoRA adapters"),
    "targets": (lambda: laplace(toy(), [(X, Y)], targets="expert"), "targets must be.*did you mean 'experts'"),
    "module": (lambda: laplace(toy(), [(X, Y)], targets=["7"]), "'7', no module of the model"),
    "not linear": (lambda: laplace(toy(), [(X, Y)], targets=["1"]), "1 is a Tanh, neither linear nor experts"),
    "rank": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=6), r"rank 6 is above both dimensions of 2 \(4 x 5\)"),
    "rank 0": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=0), "rank must be at least 1"),
    "hessian": (lambda: laplace(toy(), [(X, Y)], targets="last", hessian="full"), "hessian must be one of lowrank, kron, diag"),
    "fisher": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2, fisher="empirical"), "fisher must be"),
    "prior": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2, prior_variance=0.0), "prior_variance must be positive"),
    "labels": (lambda: laplace(toy(), [(X, Y + 3)], targets="last", rank=2), "labels of batch 0 go from 3 to 6.*4 classes"),
    "labels float": (lambda: laplace(toy(), [(X, Y.double())], targets="last", rank=2), "labels of batch 0 must be integers"),
    "labels shape": (lambda: laplace(toy(), [(X, Y[:3])], targets="last", rank=2), r"batch 0 must be integers \[24\]"),
    "no answers": (lambda: laplace(moe("mixtral"), [text()], rank=2), "answers= must name the token ids"),
    "answers": (lambda: laplace(moe("mixtral"), [text()], rank=2, answers=[3, 3]), "at least two different token ids"),
    "answers range": (lambda: laplace(moe("mixtral"), [text()], rank=2, answers=[3, 99]), "token 99 of a vocabulary of 40"),
    "prior mean": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2, prior_mean={}), "prior_mean must have 2.weight"),
    "evidence at the MAP": (
        lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).log_evidence(), "prior mean other than the MAP"),
    "evidence without labels": (
        lambda: laplace(toy(), [(X,)], targets="last", rank=2, prior_mean="zero").log_evidence(), "needs the labels"),
    "heldout without labels": (
        lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).fit_heldout([(X,)]), "batch 0 has no labels"),
    "heldout empty": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).fit_heldout([]), "held-out loader is empty"),
    "method": (lambda: laplace(toy(), [(X, Y)], targets="last", rank=2).predict((X,), method="map"), "method must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_named(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()
