"""Inputs of a sample compare by what they hold, not by where they lie."""

import hashlib
from pathlib import Path

from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import NO_INPUTS, SampleInputs, read_input_file


def test_equal_content_is_an_equal_input(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first, second = tmp_path / "cat.png", tmp_path / "elsewhere" / "cat.png"
    first.write_bytes(b"an image")
    second.write_bytes(b"an image")

    described = read_input_file(first)

    assert described == read_input_file(second)
    assert repr(described) == repr(read_input_file(second))
    assert described.path == first
    assert described.sha256 == hashlib.sha256(b"an image").hexdigest()


def test_other_content_is_another_sample(tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    image.write_bytes(b"an image")
    before = Sample("a cat", 0, "key", inputs=SampleInputs({"image": (read_input_file(image),)}))
    image.write_bytes(b"another image")
    after = Sample("a cat", 0, "key", inputs=SampleInputs({"image": (read_input_file(image),)}))

    assert before != after
    assert repr(before) != repr(after)


def test_a_prompt_alone_has_no_inputs() -> None:
    assert Sample("a cat", 0, "key").inputs is NO_INPUTS
    assert NO_INPUTS.is_empty
    assert NO_INPUTS.all_files == []
    assert not SampleInputs(strength=0.5).is_empty
    assert not SampleInputs(arguments={"layers": 3}).is_empty
