"""The process-wide memory: one built model, the old one gone before the new one is made; and drawn pictures up to a limit."""

import gc
import weakref

import pytest

from int8run import memo


class Model:
    """Stands for something large."""


@pytest.fixture(autouse=True)
def empty():
    """A real model that another test left there would be kept alive for the whole session."""
    memo.forget()
    yield
    memo.forget()


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


# -- what the float model drew -----------------------------------------------------------------------------------------------------


def test_what_was_drawn_is_recalled_by_value():
    memo.remember("a", "pictures", 1)
    assert memo.recall("".join(["a"])) == "pictures" and memo.recall("b") is None
    memo.reuse("model", Model)
    assert memo.recall("a") == "pictures", "another build leaves them"
    memo.forget()
    assert memo.recall("a") is None and memo._last == {}


def test_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(memo, "MOST_BYTES", 10)
    for key, size in (("a", 4), ("b", 4), ("c", 2)):
        memo.remember(key, key, size)
    assert [memo.recall(key) for key in "abc"] == ["a", "b", "c"], "exactly the limit"
    memo.remember("d", "d", 1)
    assert [memo.recall(key) for key in "abcd"] == [None, "b", "c", "d"]
    memo.remember("b", "new", 4)  # drawn again: the youngest now
    memo.remember("e", "e", 5)
    assert [memo.recall(key) for key in "bcde"] == ["new", None, "d", "e"]


def test_an_equal_key_is_counted_once(monkeypatch):
    monkeypatch.setattr(memo, "MOST_BYTES", 10)
    for _ in range(3):
        memo.remember("a", "pictures", 6)
    assert memo.recall("a") == "pictures"


def test_what_is_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr(memo, "MOST_BYTES", 10)
    memo.remember("a", "pictures", 11)
    assert memo.recall("a") is None and memo._drawn == {}


def test_the_old_pictures_are_gone(monkeypatch):
    monkeypatch.setattr(memo, "MOST_BYTES", 10)
    value = Model()
    seen = weakref.ref(value)
    memo.remember("a", value, 8)
    del value
    memo.remember("b", "b", 8)
    gc.collect()
    assert seen() is None
