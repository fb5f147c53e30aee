"""The comparisons that the other tests trust."""

import pytest
import torch
from support.compare import assert_close, assert_runs_like_the_reference, assert_same_integers
from support.helpers import TinyModel, randn, shipped, to_int8, usable

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("actual", "reference"),
    [
        (torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1e-9, 0.0]), torch.zeros(2)),
        (torch.ones(1), torch.ones(2)),
    ],
    ids=["too far", "nan", "zero reference", "broadcast"],
)
def test_assert_close_fails(actual, reference):
    with pytest.raises(AssertionError, match=r"^y: .*reference"):
        assert_close("y", actual, reference, 1e-2)


def test_assert_close_passes_at_the_allowed_ratio():
    assert_close("y", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.1]), 0.03)
    assert_close("zero", torch.zeros(2), torch.zeros(2), 0.0)


EXACT = torch.tensor([[10.0, 3.4999, 0.2, -6.5001]], dtype=torch.float64)
ONE = torch.ones(1, 1)


@pytest.mark.parametrize("q", [[10, 3, 0, -7], [10, 4, 0, -6]], ids=["nearest", "the other side of a tie"])
def test_integers_may_lie_on_either_side_of_a_tie(q):
    assert_same_integers("q", torch.tensor([q], dtype=torch.int8), EXACT, ONE)


@pytest.mark.parametrize(
    ("q", "exact"),
    [
        ([10, 3, 1, -7], EXACT),
        ([10, 5, 0, -7], EXACT),
        ([10, 3, 0, -7], EXACT * torch.nan),
    ],
    ids=["no tie", "two away from a tie", "nan"],
)
def test_integers_that_are_rounded_wrong_fail(q, exact):
    with pytest.raises(AssertionError, match=r"^q: \d of 4 integers are wrong; the first one is"):
        assert_same_integers("q", torch.tensor([q], dtype=torch.int8), exact, ONE)


@pytest.mark.parametrize(
    "backend", [b for b in shipped("backend").values() if usable(b, CPU)], ids=lambda b: b.name
)
@pytest.mark.parametrize("outlier", ["none", "convrot"])
def test_a_layer_is_compared_with_its_own_integers(backend, outlier):
    model, _ = to_int8(TinyModel(), backend, shipped("outlier")[outlier])
    layer = model.blocks[0][1]

    assert_runs_like_the_reference("layer", layer, randn(6, 64))
    layer.scale *= 1.01
    layer.bias += 0.1
    assert_runs_like_the_reference("layer", layer, randn(6, 64))
