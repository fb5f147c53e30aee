"""Prompt sets: where prompts come from, and the seed and key of each image."""

from pathlib import Path

import pytest

from int8run.errors import ConfigError, FileError
from int8run.generate.prompts import PromptSet, Sample, build_samples, slugify
from int8run.utils.paths import ASSETS_FOLDER


def list_prompts(prompts):
    """The prompts of a set, without what else its rows have."""
    return [row.prompt for row in prompts.read_rows()]


@pytest.fixture
def read_prompts(tmp_path):
    """Write bytes to a file and read it as a prompt set."""

    def write_and_read(data):
        (tmp_path / "p.txt").write_bytes(data)
        return list_prompts(PromptSet(path=str(tmp_path / "p.txt")))

    return write_and_read


FILES = {
    "one per line": (b"a fox\na red apple\n", ["a fox", "a red apple"]),
    "space around": (b"  a fox \n\t\n\n", ["a fox"]),
    "comments": (b"# mine\na fox # not a comment\n  # another\n", ["a fox # not a comment"]),
    "no line end": (b"a fox", ["a fox"]),
    "windows": (b"a fox\r\nan owl\r\n", ["a fox", "an owl"]),
    "utf-8": ("ein Fuchs über Bäumen\n狐\n".encode(), ["ein Fuchs über Bäumen", "狐"]),
    "byte order mark": (b"\xef\xbb\xbfa fox\n", ["a fox"]),
    "repeated": (b"a fox\na fox\n", ["a fox", "a fox"]),
}


@pytest.mark.parametrize(("data", "prompts"), FILES.values(), ids=FILES)
def test_a_file_holds_one_prompt_per_line(read_prompts, data, prompts):
    assert read_prompts(data) == prompts


@pytest.mark.parametrize("data", [b"", b"\n\n", b"# only\n# comments\n"], ids=["empty", "blank", "comments"])
def test_a_file_without_prompts_is_an_error(read_prompts, data):
    with pytest.raises(FileError, match=r"prompts\.path=/.*p\.txt holds no prompt; write one per line"):
        read_prompts(data)


def test_a_file_that_is_not_text_is_an_error(read_prompts):
    with pytest.raises(FileError, match=r"prompts\.path=/.*p\.txt.*UTF-8"):
        read_prompts(b"\xff\xfe\x00a")


def test_utf16_without_a_mark_is_an_error(read_prompts):
    with pytest.raises(FileError, match=r"p\.txt is not UTF-8 text: it has zero bytes; save it as UTF-8"):
        read_prompts("fox\n".encode("utf-16-le"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux has this file, which nobody can read")
def test_a_file_that_the_system_does_not_read_is_an_error():
    with pytest.raises(FileError, match=r"prompts\.path=/proc/self/mem could not be read: "):
        PromptSet(path="/proc/self/mem").read_rows()


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_separator_inside_of_a_line_does_not_cut_the_prompt(read_prompts, separator):
    assert read_prompts(f"a{separator}b\r\nc\rd".encode()) == [f"a{separator}b", "c", "d"]


def test_the_error_for_a_missing_file_has_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(
        FileError, match=rf"prompts\.path=sub/p\.txt: no such file \(looked for {tmp_path}/sub/p\.txt\)"
    ):
        PromptSet(path="sub/p.txt").read_rows()


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a fox\n")

    assert list_prompts(PromptSet(path="~/p.txt")) == ["a fox"]


def test_prompts_of_the_config_are_taken_as_they_are():
    assert list_prompts(PromptSet(prompts=("# a fox ", "b"))) == ["# a fox ", "b"]


@pytest.mark.parametrize(
    "given", [{}, {"prompts": []}, {"prompts": ["a"], "path": "p.txt"}], ids=["neither", "empty list", "both"]
)
def test_exactly_one_source_is_needed(given):
    with pytest.raises(ConfigError, match=r"exactly one of prompts\.prompts=\[…\] and prompts\.path=<file"):
        PromptSet(**given)


def test_one_prompt_without_brackets_is_not_a_list_of_letters():
    # int8run prompts.prompts=fox
    with pytest.raises(ConfigError, match=r"prompts\.prompts is \"fox\".*\[fox\]"):
        PromptSet(prompts="fox")


@pytest.mark.parametrize("count", [0, -1, 10_001, "2", True], ids=repr)
def test_seeds_per_prompt_have_a_range(count):
    with pytest.raises(
        ConfigError,
        match=rf"prompts\.seeds_per_prompt is {count!r}; allowed is a whole number from 1 to 10000",
    ):
        PromptSet(prompts=("a",), seeds_per_prompt=count)


def test_samples_are_prompts_times_seeds():
    assert build_samples(["A fox!", "an owl"], 2, seed=7) == [
        Sample("A fox!", 7, "000_a-fox_s7"),
        Sample("A fox!", 8, "000_a-fox_s8"),
        Sample("an owl", 7, "001_an-owl_s7"),
        Sample("an owl", 8, "001_an-owl_s8"),
    ]


def test_keys_differ_even_where_prompts_do_not():
    keys = [s.key for s in build_samples(["x" * 50, "x" * 50, "?", "狐"], 3, seed=0)]

    assert len(set(keys)) == len(keys) == 12


SLUGS = {
    "plain": ("fox", "fox"),
    "signs": ("A red, ripe apple?", "a-red--ripe-apple"),
    "path": ("../../etc/passwd", "etc-passwd"),
    "long": ("ab " * 40, "ab-" * 13 + "a"),
    "other letters": ("Bär 狐", "bär-狐"),
    "marks": ("हिन्दी", "हिन्दी"),
    "apart": ("Ba\u0308r", "bär"),
    "symbols": ("🦊!", "fox"),
    "many bytes": ("狐" * 100, "狐" * 40),
    "most bytes": ("𠀀" * 100, "𠀀" * 40),
    "none": ("", "empty"),
}


@pytest.mark.parametrize(("text", "name"), SLUGS.values(), ids=SLUGS)
def test_a_prompt_becomes_part_of_a_file_name(text, name):
    assert slugify(text) == name


def test_an_input_may_be_one_of_this_package():
    prompts = PromptSet(prompts=["mirror it"], image="shipped:images/teapot.png")

    (row,) = prompts.read_rows()

    (file,) = row.files["image"]
    assert file.path.is_file()
    assert file.path == ASSETS_FOLDER / "images" / "teapot.png"
