"""The tensors in nested values."""

from collections import OrderedDict
from types import SimpleNamespace

import torch

from int8run.utils.tensors import iter_tensors


def test_tensors_are_found_at_any_depth() -> None:
    a, b, c, d = (torch.tensor(float(i)) for i in range(4))
    found = list(iter_tensors((a, [b, None, "words"], OrderedDict(x=(c,), y=3), SimpleNamespace(z=d))))

    assert [t.item() for t in found] == [0, 1, 2]
    assert list(iter_tensors(None)) == []
