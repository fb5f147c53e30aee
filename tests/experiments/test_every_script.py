"""Every script of `experiments/` can be started, and has a test that runs it."""

import ast
import importlib.util
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


def list_missing_names(file: Path) -> list[str]:
    """What a script imports from int8run, also inside its functions, and is not there."""
    missing = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("int8run"):
            continue
        module = importlib.import_module(str(node.module))
        for name in node.names:
            if not hasattr(module, name.name) and not is_module(f"{node.module}.{name.name}"):
                missing.append(f"{file.name}: {node.module}.{name.name}")
    return missing


def is_module(name: str) -> bool:
    """Whether there is a module of that name."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_what_scripts_import_inside_their_functions_is_there() -> None:
    missing = [name for file in EXPERIMENTS.rglob("*.py") for name in list_missing_names(file)]
    assert missing == []


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_a_shell_script_has_no_syntax_error(script: str) -> None:
    checked = subprocess.run(
        ["bash", "-n", str(EXPERIMENTS / script)], capture_output=True, text=True, check=False
    )

    assert (checked.returncode, checked.stderr) == (0, "")
