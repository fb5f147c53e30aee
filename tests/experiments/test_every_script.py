"""Every script of `experiments/` can be started, and has a test that runs it."""

import ast
import subprocess
from pathlib import Path

import pytest
from support.experiment_script import EXPERIMENTS, find_scripts, run_script

# no words of the command line: these are spoken to by another script
STARTED_BY = {
    "linear_bench/worker.py": "linear_bench/bench.py",
    "model_bench/worker.py": "model_bench/bench.py",
}
RUNNERS = ("run_script", "run_in_process")
SHELL_SCRIPTS = [script for script in find_scripts() if script.endswith(".sh")]
PYTHON_SCRIPTS = [script for script in find_scripts() if script.endswith(".py")]


def find_run_scripts(file: Path) -> set[str]:
    """The scripts that a test file gives to `run_script`, on any machine."""
    found = set()
    for function in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(function, ast.FunctionDef) or needs_gpu(function):
            continue
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) in RUNNERS:
                found |= {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)}
    return found & set(find_scripts())


def needs_gpu(test: ast.FunctionDef) -> bool:
    """Whether a test is skipped on a machine without a GPU."""
    return any(getattr(decorator, "id", None) == "NEEDS_GPU" for decorator in test.decorator_list)


def test_every_script_is_run_by_a_test_on_a_machine_without_a_gpu() -> None:
    tested = set(SHELL_SCRIPTS)
    for file in Path(__file__).parent.glob("test_*.py"):
        if file != Path(__file__):
            tested |= find_run_scripts(file)
    tested |= {worker for worker, starter in STARTED_BY.items() if starter in tested}

    assert sorted(set(find_scripts()) - tested) == []


@pytest.mark.parametrize("script", sorted(set(PYTHON_SCRIPTS) - set(STARTED_BY)))
def test_a_script_can_be_imported_and_explains_itself(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(script, "--help")

    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_a_shell_script_has_no_syntax_error(script: str) -> None:
    checked = subprocess.run(
        ["bash", "-n", str(EXPERIMENTS / script)], capture_output=True, text=True, check=False
    )

    assert (checked.returncode, checked.stderr) == (0, "")
