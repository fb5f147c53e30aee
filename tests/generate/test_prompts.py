"""Prompt sets: where prompts come from, and the samples made of them."""

import pytest

from int8run.errors import ConfigError, FileError
from int8run.generate.prompts import PromptSet, Sample, samples, slug


def test_prompts_from_the_config():
    assert PromptSet(["a fox", "an apple"]).read() == ["a fox", "an apple"]


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("  a fox \n\n# a comment\nan apple # with a hash\nein Köder\n", encoding="utf-8")
    assert PromptSet(path=str(path)).read() == ["a fox", "an apple # with a hash", "ein Köder"]


@pytest.mark.parametrize("prompts", [{}, {"prompts": ["a fox"], "path": "prompts.txt"}, {"prompts": [], "path": ""}], ids=str)
def test_exactly_one_source(prompts):
    with pytest.raises(ConfigError, match=r"prompts needs exactly one of prompts\.prompts=\[…\] and prompts\.path="):
        PromptSet(**prompts)


@pytest.mark.parametrize("seeds", [0, 10_001, "2", 1.5], ids=repr)
def test_seeds_per_prompt(seeds):
    with pytest.raises(ConfigError, match=rf"prompts\.seeds_per_prompt is {seeds!r}; allowed is "):
        PromptSet(["a fox"], seeds_per_prompt=seeds)


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=rf"prompts\.path=gone\.txt: no such file \(looked for {tmp_path}/gone\.txt\)"):
        PromptSet(path="gone.txt").read()


@pytest.mark.parametrize("text", ["", "\n \n", "# only a comment\n"], ids=["empty", "blank lines", "comments"])
def test_a_file_without_prompts(tmp_path, text):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(FileError, match=r"prompts\.txt holds no prompt; write one per line"):
        PromptSet(path=str(path)).read()


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(FileError, match=r"prompts\.txt.*(UTF-8|utf-8|text)"):
        PromptSet(path=str(path)).read()


def test_samples_are_prompts_times_seeds():
    assert samples(["a fox", "an apple"], 2, seed=7) == [
        Sample("a fox", 7, "000_a-fox_s7"),
        Sample("a fox", 8, "000_a-fox_s8"),
        Sample("an apple", 7, "001_an-apple_s7"),
        Sample("an apple", 8, "001_an-apple_s8"),
    ]


def test_equal_prompts_have_different_keys():
    keys = [s.key for s in samples(["a fox", "a fox", "A FOX!"], 3, seed=0)]
    assert len(set(keys)) == 9


@pytest.mark.parametrize(
    ("text", "name"),
    [("A Fox, red", "a-fox--red"), ("../../etc/passwd", "etc-passwd"), ("Köder", "k-der"), ("狐", "empty"), ("x" * 60, "x" * 40)],
)
def test_slug_is_safe_in_a_file_name(text, name):
    assert slug(text) == name
