"""The test helpers must be able to fail."""

import pytest
import torch

from tests.support import assert_accurate, poisoned_memory


def sample():
    exact = torch.randn(64, 32, dtype=torch.float64)
    return exact, exact.bfloat16()


def test_accepts_the_same_rounding():
    exact, rounded = sample()
    assert_accurate(rounded, rounded, exact)


@pytest.mark.parametrize("spoil", [lambda t: t.mul_(1.05), lambda t: t[3, 4].add_(1.0), lambda t: t[0].zero_()])
def test_rejects_a_wrong_kernel(spoil):
    exact, rounded = sample()
    wrong = rounded.clone()
    spoil(wrong)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(wrong, rounded, exact)


def test_rejects_nan_and_wrong_shape():
    exact, rounded = sample()
    wrong = rounded.clone()
    wrong[1, 1] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        assert_accurate(wrong, rounded, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(rounded[:1], rounded, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(rounded.float(), rounded, exact)


def test_poison_fills_what_our_bindings_allocate():
    import effcore.ops.attention  # noqa: F401

    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
