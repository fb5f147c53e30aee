"""Twenty thousand damaged inputs for all readers, always the same ones: none may crash, none may be read
otherwise than an independent reader reads it.

One that fails is named with its seed and number; `experiments/faults/fuzz.py --reader NAME --seed N --only
NUMBER` makes it again. An input that hangs ends with the whole test's limit.
"""

import logging
import runpy
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fuzzing.rule import CRASH, READERS, REFUSED, RIGHT, SILENT, judge, try_input, try_inputs

from int8run.errors import FileError
from int8run.generate.prompt_row import PromptRow
from int8run.generate.prompts import PromptSet

SCRIPT = Path(__file__).parents[2] / "experiments" / "faults" / "fuzz.py"
SEED, INPUTS, CHUNKS = 0, 20_000, 5
# inputs of a chunk that are read, and that are refused, at least: of a fuzzer that only breaks files beyond
# recognition, or hardly touches them, nothing is learned
LEAST_SHARE = 0.15


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """Nobody reads some ten thousand warnings."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_are_refused_or_read_right(name: str, chunk: int, tmp_path: Path) -> None:
    size = INPUTS * READERS[name].share // 1000 // CHUNKS

    counts, faults = try_inputs(name, SEED, range(chunk * size, (chunk + 1) * size), tmp_path)

    assert not faults, "\n".join(faults[:3])
    assert min(counts[REFUSED], counts[RIGHT]) > LEAST_SHARE * size, counts


@pytest.mark.parametrize("name", READERS)
def test_a_few_of_each_reader(name: str, tmp_path: Path) -> None:
    _, faults = try_inputs(name, SEED, range(100 if READERS[name].share > 100 else 5), tmp_path)
    assert not faults, "\n".join(faults)


def test_two_hundred_gguf_files(tmp_path: Path) -> None:
    counts, faults = try_inputs("gguf", SEED, range(200), tmp_path)
    assert not faults, "\n".join(faults)
    assert min(counts[REFUSED], counts[RIGHT]) > LEAST_SHARE * 200, counts


def test_the_shares_are_of_a_thousand() -> None:
    assert sum(reader.share for reader in READERS.values()) == 1000


def test_an_input_can_be_made_again(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    for number, name in enumerate(("denoiser", "lora", "prompts")):
        for folder in (first, again):
            folder.mkdir(exist_ok=True)
            try_input(name, SEED, number, folder)
        files = {path.name: path.read_bytes() for path in (first / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (again / name).iterdir()}


def run_script(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the fuzzer that runs by hand."""
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *words])
    return int(runpy.run_path(str(SCRIPT))["main"]())


@pytest.mark.usefixtures("one_thread")
def test_the_script_counts_what_it_tries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--reader", "prompts", "--seed", str(SEED))

    assert run_script(monkeypatch, *words, "--minutes", "0") == 0
    assert f"| prompts | {READERS['prompts'].share} |" in capsys.readouterr().out

    monkeypatch.setattr(PromptSet, "read_rows", lambda self: [PromptRow("another prompt")])

    assert run_script(monkeypatch, *words, "--only", "1") == 1
    out = capsys.readouterr().out
    assert f"prompts, seed {SEED}, input 1: silent" in out and "| prompts | 1 | 0 | 0 | 0 | 0 | 1 |" in out


def test_what_must_not_be_is_told_from_what_may(tmp_path: Path) -> None:
    def raise_error(error: Exception) -> tuple[str, str]:
        def check(chance: Random, folder: Path) -> bool:
            raise error

        return judge(check, Random(0), tmp_path)

    assert raise_error(FileError("x is damaged")) == (REFUSED, "")
    assert raise_error(FileError(" "))[0] == CRASH, "an error without a message"
    assert raise_error(AssertionError("other numbers"))[0] == SILENT
    assert raise_error(KeyError("x"))[0] == CRASH
    assert judge(lambda *_: True, Random(0), tmp_path) == (RIGHT, "")
