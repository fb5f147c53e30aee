"""Messages stay one line, whatever a stranger's file is called or calls its tensors."""

import pickle

import pytest

from int8run.errors import (
    BackendError,
    ConfigError,
    FileError,
    LoraError,
    SweepError,
    TrackingError,
    check_choice,
)


@pytest.mark.parametrize("error_class", [FileError, LoraError, ConfigError, BackendError, TrackingError])
def test_control_characters_of_a_name_are_shown_as_escapes(error_class):
    error = error_class("lora\n.safetensors: conv_\x1b[31m\r\x00 has no alpha")

    assert str(error) == r"lora\n.safetensors: conv_\x1b[31m\r\x00 has no alpha"


def test_an_error_of_a_sweep_has_a_line_for_each_job():
    assert str(SweepError("job 1: no\njob 2: no", 2)) == "job 1: no\njob 2: no"


def test_other_letters_stay_as_they_are():
    message = "C:\\models\\лиса é 🦊.safetensors is not there"

    assert str(FileError(message)) == message


def test_an_error_comes_through_a_process_unchanged():
    error = FileError("two\nlines")

    copy = pickle.loads(pickle.dumps(error))

    assert str(copy) == str(error) == r"two\nlines"


@pytest.mark.parametrize("value", [["a"], {"a": 1}, None, 1.5, True])
@pytest.mark.parametrize("allowed", [("a", "b"), {"a": 1, "b": 2}, frozenset({"a", "b"})])
def test_a_value_of_any_type_is_no_choice(value, allowed):
    with pytest.raises(ConfigError, match=r"^key is .*; choose from a, b$"):
        check_choice("key", value, allowed)
