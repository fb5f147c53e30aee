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
SHELL_SCRIPTS = [script for script in find_scripts() if script.endswith(".sh")]
PYTHON_SCRIPTS = [script for script in find_scripts() if script.endswith(".py")]


def find_script_names(file: Path) -> set[str]:
    """The strings of a test file that name a script."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return texts & set(find_scripts())


def test_every_script_has_a_test_that_runs_it() -> None:
    tested = set(SHELL_SCRIPTS)
    for file in Path(__file__).parent.glob("test_*.py"):
        if file != Path(__file__):
            tested |= find_script_names(file)
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
