"""Scores of probabilities against numbers worked out by hand and scikit-learn."""

import pytest
import torch

from effcore.errors import InputError
from effcore.methods import calibration as c

P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.55, 0.45]])
Y = torch.tensor([0, 1, 1, 0])


def test_by_hand():
    assert c.accuracy(P, Y) == 0.75
    assert c.nll(P, Y) == pytest.approx(-torch.tensor([0.9, 0.2, 0.7, 0.55]).log().mean().item())
    assert c.brier(P, Y) == pytest.approx((2 * 0.01 + 2 * 0.64 + 2 * 0.09 + 2 * 0.2025) / 4)
    # Four bins with one prediction each: |1 - .9|, |0 - .8|, |1 - .7|, |1 - .55|
    assert c.ece(P, Y) == pytest.approx((0.1 + 0.8 + 0.3 + 0.45) / 4)
    # One bin: mean confidence 0.7375, accuracy 0.75
    assert c.ece(P, Y, bins=1) == pytest.approx(0.0125)


def test_a_bin_ends_where_the_next_begins():
    p = torch.tensor([[0.6, 0.4], [0.61, 0.39], [1.0, 0.0]], dtype=torch.float64)
    _, _, share = c.reliability(p, torch.zeros(3, dtype=torch.long), 5)
    torch.testing.assert_close(share, torch.tensor([0, 0, 1, 1, 1.0], dtype=torch.float64) / 3)


def test_auroc_with_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    inside, outside = (torch.randint(0, 4, (n, 3)).float().softmax(1) for n in (50, 70))
    truth = [0] * 50 + [1] * 70
    expected = metrics.roc_auc_score(truth, 1 - torch.cat([inside, outside]).double().max(1).values)
    assert c.ood_auroc(inside, outside) == pytest.approx(expected)


def test_temperature_undoes_a_scale():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert c.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    c.draw_reliability(tmp_path / "r.png", {"MAP": (P, Y), "posterior": (P, Y)})
    assert (tmp_path / "r.png").stat().st_size > 5000


REFUSED = {
    "classes": (lambda: c.nll(P, torch.tensor([0, 1, 2, 0])), "labels go from 0 to 2 with 2 classes"),
    "shape": (lambda: c.ece(P, Y[:3]), r"expected probabilities \[N, classes\] and integer labels"),
    "float": (lambda: c.brier(P, Y.float()), "integer labels"),
    "logits": (lambda: c.nll(P * 3, Y), "sum to 1"),
    "nan": (lambda: c.nll(P * float("nan"), Y), "sum to 1"),
    "empty": (lambda: c.accuracy(P[:0], Y[:0]), "no predictions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()
