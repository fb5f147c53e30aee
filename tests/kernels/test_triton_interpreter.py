"""What tests/support/triton_process.py repairs of Triton's interpreter, whichever version is installed."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from support.triton_process import repair_index
from triton.runtime import interpreter


class Number:
    """A scalar of the language: the interpreter holds it as an array of one number."""

    def __init__(self, value):
        self.handle = SimpleNamespace(data=np.array([value]))


class Scope:
    """Takes what the interpreter patches."""

    def set_attr(self, target, name, value):
        setattr(target, name, value)


def patch_as_triton_3_6(tensor, scope):
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))


def test_an_array_of_one_number_is_an_integer(monkeypatch):
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_as_triton_3_6)
    repair_index()
    interpreter._patch_lang_tensor(Number, Scope())

    assert list(range(0, Number(6), Number(2))) == [0, 2, 4]
