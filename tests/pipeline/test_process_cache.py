"""The process-wide memory: one built model, the old one gone before the new one is made; and drawn images
up to a limit.
"""

import gc
import weakref

import pytest

from int8run.pipeline import process_cache


class Model:
    """Stands for something large."""


@pytest.fixture(autouse=True)
def empty():
    """A real model that another test left there would be kept alive for the whole session."""
    process_cache.clear()
    yield
    process_cache.clear()


def never():
    raise AssertionError("an equal key was built again")


def test_an_equal_key_gives_the_same_object_and_says_so():
    built, reused = process_cache.get_or_build("a", Model)
    assert isinstance(built, Model) and reused is False
    # another string object with the same text: value counts, not identity
    assert process_cache.get_or_build("".join(["a"]), never) == (built, True)


def test_another_key_gives_a_new_object():
    first, _ = process_cache.get_or_build("a", Model)
    second, reused = process_cache.get_or_build("b", Model)
    assert second is not first and reused is False
    assert process_cache.get_or_build("a", Model)[1] is False, "only the last one is kept"


def test_the_old_one_is_gone_before_the_new_one_is_made():
    old = weakref.ref(process_cache.get_or_build("a", Model)[0])

    def make():
        gc.collect()
        assert old() is None, "two models would be in memory at once"
        return Model()

    process_cache.get_or_build("b", make)


def test_a_build_that_fails_leaves_nothing_behind():
    process_cache.get_or_build("a", Model)
    with pytest.raises(ZeroDivisionError):
        process_cache.get_or_build("b", lambda: 1 / 0)
    assert process_cache._last_build == {}
    assert process_cache.get_or_build("b", Model)[1] is False


def test_a_built_none_is_remembered_too():
    process_cache.get_or_build("a", lambda: None)
    assert process_cache.get_or_build("a", never) == (None, True)


# -- what the float model drew -------------------------------------------------------------------------------


def test_what_was_generated_is_recalled_by_value():
    process_cache.put("a", "images", 1)
    assert process_cache.get("".join(["a"])) == "images" and process_cache.get("b") is None
    process_cache.get_or_build("model", Model)
    assert process_cache.get("a") == "images", "another build leaves them"
    process_cache.clear()
    assert process_cache.get("a") is None and process_cache._last_build == {}


def test_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(process_cache, "MAX_BYTES", 10)
    for key, size in (("a", 4), ("b", 4), ("c", 2)):
        process_cache.put(key, key, size)
    assert [process_cache.get(key) for key in "abc"] == ["a", "b", "c"], "exactly the limit"
    process_cache.put("d", "d", 1)
    assert [process_cache.get(key) for key in "abcd"] == [None, "b", "c", "d"]
    process_cache.put("b", "new", 4)  # drawn again: the youngest now
    process_cache.put("e", "e", 5)
    assert [process_cache.get(key) for key in "bcde"] == ["new", None, "d", "e"]


def test_an_equal_key_is_counted_once(monkeypatch):
    monkeypatch.setattr(process_cache, "MAX_BYTES", 10)
    for _ in range(3):
        process_cache.put("a", "images", 6)
    assert process_cache.get("a") == "images"


def test_what_is_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr(process_cache, "MAX_BYTES", 10)
    process_cache.put("a", "images", 11)
    assert process_cache.get("a") is None and process_cache._generated == {}


def test_the_old_images_are_gone(monkeypatch):
    monkeypatch.setattr(process_cache, "MAX_BYTES", 10)
    value = Model()
    seen = weakref.ref(value)
    process_cache.put("a", value, 8)
    del value
    process_cache.put("b", "b", 8)
    gc.collect()
    assert seen() is None
