"""`experiments/faults/`: what its scripts call a fault, and small versions of what they do by hand."""

import re
import subprocess
import sys

import pytest
from support.experiment_script import EXPERIMENTS, load_script
from support.experiment_script import run_script as run_in_process

FOLDER = EXPERIMENTS / "faults"


def run_script(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in a process of its own: what is tried is what it does to processes."""
    command = [sys.executable, str(EXPERIMENTS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_each_fault_that_is_tried_stands_in_the_readme() -> None:
    tried = {fault.__name__ for fault in load_script("faults/run.py").FAULTS}
    told = set(re.findall(r"^\| `(\w+)`", (FOLDER / "README.md").read_text(), flags=re.MULTILINE))

    assert tried == told


# -- paths.py ----------------------------------------------------------------------------------------


PROBLEMS = {
    "fine": (0, "", None),
    "one line": (3, "a log line\nint8run: a.txt: no such file\n", None),
    "too late": (None, "", "did not end"),
    "traceback": (1, "Traceback (most recent call last):\nOSError: x\n", "a traceback: OSError: x"),
    "other code": (1, "int8run: x\n", "exit code 1"),
    "two lines": (2, "int8run: x\ny\n", "2 lines"),
    "no line": (2, "", "0 lines"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_command_passes_with_one_line_and_the_code_of_a_setting_or_file(name: str) -> None:
    code, text, problem = PROBLEMS[name]

    found = load_script("faults/paths.py").Attempt("save", "pipe", code, text, 0.0).problem

    assert found is None if problem is None else str(found).startswith(problem)


def test_a_path_is_quoted_for_the_command_line() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    quote = load_script("faults/paths.py").quote
    for text in ("a b", "it's", "a\\", "a\\'b", "a,b=[c]", ""):
        (override,) = OverridesParser.create().parse_overrides([f"key={quote(text)}"])
        assert override.value() == text


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the rights of root are taken away as Linux has them")
def test_paths_that_cannot_work_are_one_line_in_real_commands() -> None:
    settings = [
        "prompts.path",
        "task.path, inspect",
        "save, quantize",
        "tracker.uri, sqlite",
        "hydra.run.dir",
    ]
    kinds = ["pipe", "NUL", "~unknown", "unreadable file", "in a read-only folder", "link loop"]

    done = run_script("faults/paths.py", "--settings", *settings, "--kinds", *kinds)

    if "nobody may not read" in done.stderr:
        pytest.skip("as root, the script needs a Python that others may read")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 pairs, 0 do not pass" in done.stdout


# -- many.py -----------------------------------------------------------------------------------------


def test_growth_is_what_a_job_leaves_in_the_median() -> None:
    many = load_script("faults/many.py")
    counts = [1000, 5000, 5100, 5200, 9000, 9100, 9200]
    samples = [many.Sample(0.0, objects, 0, 0, 0) for objects in counts]

    assert many.count_growth(samples) == 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jobs", "runs"])
def test_a_job_costs_no_more_after_others(kind: str) -> None:
    """It leaves no files and threads open, and of Python's objects what a sweep keeps of each job."""
    done = run_script("faults/many.py", kind, "8")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "objects per job: " in done.stdout


# -- run.py and writers.py ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fault_is_tried_with_the_real_command() -> None:
    done = run_script("faults/run.py", "--only", "home_is_absent")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout


@pytest.mark.slow
def test_writers_of_one_database_lose_nothing() -> None:
    done = run_script("faults/writers.py", "--processes", "2", "--runs", "1", "--images", "1")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "all complete, each once" in done.stdout


# -- fuzz.py -----------------------------------------------------------------------------------------


def test_one_damaged_input_can_be_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    run_in_process("faults/fuzz.py", "--reader", "prompts", "--seed", "0", "--only", "1")

    assert "| prompts | 1 |" in capsys.readouterr().out
