"""The Laplace posterior of a last layer: against dense algebra, draws and laplace-torch."""

import copy

import pytest
import torch

from effcore.methods.bayesian_moe import Posterior, laplace
from effcore.methods.laplace_file import read_safetensors, write_safetensors
from effcore.methods.laplace_table import PriorTable
from effcore.reference.kronecker import dense_factor
from tests.methods.laplace_toys import batches, data, toy


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


@pytest.mark.parametrize("targets", [["2"], ["0", "2"]])
def test_activations_in_place_change_nothing(targets):
    torch.manual_seed(0)
    plain, (x, y) = toy(), data()
    features, classes = plain[-1].in_features, plain[-1].out_features
    factors = []
    for inplace in (False, True):
        layers = [torch.nn.Linear(x.shape[1], 6), torch.nn.Tanh(), torch.nn.Linear(6, features), torch.nn.ReLU(inplace)]
        torch.manual_seed(1)
        model = torch.nn.Sequential(*layers, torch.nn.Linear(features, classes)).to(x.dtype)
        for p in model.parameters():
            torch.nn.init.normal_(p)
        posterior = laplace(model, [(x, y)], targets=targets, hessian="kron")
        factors.append([t for layer in posterior.layers for factor in layer.factors for t in factor])
    torch.testing.assert_close(factors[0], factors[1])


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


def test_a_temperature_goes_with_the_prior(tmp_path):
    """Of labels that follow the MAP at a third of its logits it is found, and the pair is no worse than either alone."""
    model, (x, y) = toy(), data()
    with torch.no_grad():
        model[-1].weight *= 10
    posterior = laplace(model, batches(x, y, 6), targets="last", rank=2)
    torch.manual_seed(1)
    held, grid = torch.randn(2000, 3, dtype=torch.float64), torch.logspace(-8, 4, 13).tolist()
    logits = model(held).detach()
    labels = torch.distributions.Categorical(logits=logits / 3).sample()

    def nll(p):
        return -p.gather(1, labels[:, None]).log().mean()

    posterior.fit_heldout([(held, labels)], temperature=True, grid=grid)
    assert 2.5 < posterior.temperature < 3.5
    p = posterior.predict((held,), samples=256)
    posterior.save(tmp_path / "p.safetensors")
    again = Posterior.load(tmp_path / "p.safetensors", model)
    assert torch.equal(again.predict((held,), samples=256), p)
    assert nll(p) < nll((logits / 3).softmax(1)) + 2e-3
    posterior.fit_heldout([(held, labels)], grid=grid)
    assert posterior.temperature == 1 and nll(p) < nll(posterior.predict((held,), samples=256))


def test_a_temperature_goes_with_one_prior_a_layer():
    """Labels drawn with one layer's covariance and a temperature: that layer alone keeps a variance."""
    torch.manual_seed(0)
    variances = torch.tensor([1e-4, 0.2, 4.0], dtype=torch.float64)
    mean = 4 * torch.randn(600, 3, dtype=torch.float64)
    roots = torch.randn(2, 600, 3, 3, dtype=torch.float64) * torch.rand(2, 600, 1, 1, dtype=torch.float64) * 4
    roots[1] += 2 * torch.eye(3)
    units = roots @ roots.mT
    table = PriorTable(variances, mean, units[:, None] * variances[:, None, None, None], torch.zeros(600).long())
    logits = torch.distributions.MultivariateNormal(mean / 2, 0.2 * units[1] / 4 + 1e-6 * torch.eye(3)).sample()
    table.labels = torch.distributions.Categorical(logits=logits).sample()

    def nll(choice):
        return -table.probabilities(choice).gather(1, table.labels[:, None]).log().mean()

    shared, alone, both = (
        table.choose(per_layer=layers, temperature=t) for layers, t in ((False, True), (True, False), (True, True))
    )
    assert both.variances == (0, 1) and 1.5 < both.temperature < 2.7
    assert nll(both) < min(nll(shared), nll(alone)) - 0.005 and alone.temperature == 1


def test_each_layer_gets_its_own_prior():
    """Of held-out labels the table's choice; of the evidence each layer's own maximum."""
    model, (x, y) = toy(), data()
    with torch.no_grad():
        model[0].weight *= 4
    posterior = laplace(model, [(x, y)], targets=["0", "2"], hessian="kron", prior_mean="zero")
    held, grid = data(40, seed=5), [1e-3, 0.1, 1.0, 30.0]
    table = posterior.tabulate([held], grid)
    choice = table.choose(per_layer=True, temperature=True)
    posterior.fit_heldout([held], per_layer=True, temperature=True, grid=grid)
    assert posterior.prior_variance.tolist() == [grid[i] for i in choice.variances]
    assert posterior.temperature == choice.temperature != 1
    torch.testing.assert_close(posterior.predict((held[0],)), table.probabilities(choice))
    posterior.fit_evidence(per_layer=True)
    assert posterior.temperature == 1
    best = posterior.prior_variance.double()
    evidence = posterior.log_evidence(best)
    for i in range(2):
        for factor in (0.9, 1.1):
            other = best.clone()
            other[i] *= factor
            assert posterior.log_evidence(other) < evidence
    assert best[0] > 2 * best[1]


def test_probit_divides_by_the_temperature_too():
    posterior = laplace(toy(), [data()], targets="last", hessian="kron", prior_variance=5.0)
    mean, covariance = posterior.logit_distribution((data()[0],))
    posterior.temperature = 3.0
    expected = mean / (9 + torch.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
    torch.testing.assert_close(posterior.predict((data()[0],), method="probit"), expected.softmax(-1))


def test_a_file_from_before_temperatures_has_one_of_1(tmp_path):
    model, (x, y) = toy(), data()
    posterior = laplace(model, [(x, y)], targets="last", hessian="kron", prior_variance=5.0)
    file, plain = tmp_path / "p.safetensors", posterior.predict((x,))
    posterior.temperature = 3.0
    posterior.save(file)
    assert Posterior.load(file, model).temperature == 3
    tensors, about = read_safetensors(file)
    del about["temperature"]
    write_safetensors(file, tensors, about)
    # Not to the bit: a product's order of summation may follow where its operands lie in memory (MKL on AMD's CPUs).
    torch.testing.assert_close(Posterior.load(file, model).predict((x,)), plain)


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
@pytest.mark.parametrize(
    "structure, count", [("kron", 24), ("full", 1)]
)  # of one example the Kronecker product is exact
def test_agrees_with_laplace_torch(structure, count, variance):
    other = pytest.importorskip("laplace")
    from laplace.curvature import CurvlinopsGGN

    model, (x, y) = toy(torch.float32), data(count, dtype=torch.float32)
    posterior = laplace(model, [(x, y)], targets="last", hessian="kron", prior_mean="zero", prior_variance=variance)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    theirs = other.Laplace(
        copy.deepcopy(model), "classification", subset_of_weights="last_layer", hessian_structure=structure,
        prior_precision=1 / variance, backend=CurvlinopsGGN,
    )  # fmt: skip
    theirs.fit(loader)
    mean, covariance = theirs._glm_predictive_distribution(x)
    ours = posterior.logit_distribution((x,))
    torch.testing.assert_close(ours[0], mean.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], covariance.detach(), rtol=1e-4, atol=1e-5)
    evidence = theirs.log_marginal_likelihood().item()
    assert posterior.log_evidence().item() == pytest.approx(evidence, rel=1e-4)
