"""The comparison that the other tests trust."""

import pytest
import torch
from support.helpers import assert_close


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
