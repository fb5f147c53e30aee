"""The one process-wide memory: by value, one entry, the old one gone before the new one is made."""

import gc
import weakref

import pytest

from int8run import memo


class Model:
    """Stands for something large."""


@pytest.fixture(autouse=True)
def empty():
    """A real model that another test left there would be kept alive for the whole session."""
    memo._last.clear()
    yield
    memo._last.clear()


def never():
    raise AssertionError("an equal key was built again")


def test_an_equal_key_gives_the_same_object_and_says_so():
    built, reused = memo.reuse("a", Model)
    assert isinstance(built, Model) and reused is False
    # another string object with the same text: value counts, not identity
    assert memo.reuse("".join(["a"]), never) == (built, True)


def test_another_key_gives_a_new_object():
    first, _ = memo.reuse("a", Model)
    second, reused = memo.reuse("b", Model)
    assert second is not first and reused is False
    assert memo.reuse("a", Model)[1] is False, "only the last one is kept"


def test_the_old_one_is_gone_before_the_new_one_is_made():
    old = weakref.ref(memo.reuse("a", Model)[0])

    def make():
        gc.collect()
        assert old() is None, "two models would be in memory at once"
        return Model()

    memo.reuse("b", make)


def test_a_build_that_fails_leaves_nothing_behind():
    memo.reuse("a", Model)
    with pytest.raises(ZeroDivisionError):
        memo.reuse("b", lambda: 1 / 0)
    assert memo._last == {}
    assert memo.reuse("b", Model)[1] is False


def test_a_built_none_is_remembered_too():
    memo.reuse("a", lambda: None)
    assert memo.reuse("a", never) == (None, True)
