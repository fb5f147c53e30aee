"""The examples of docs/extending.md: files are put into a copy of the repository, commands run there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^<!-- (?P<what>[^\n]+) -->\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = ["tracker=none", "cache.limit_gb=0", "sampler.steps=2", "prompts.prompts=[fox]"]


def read_blocks() -> list[tuple[str, str]]:
    """(what a block is for, its text) of every marked block, in the page's order."""
    return [(block["what"], block["text"]) for block in BLOCK.finditer(PAGE.read_text())]


def copy_repository(target: Path) -> None:
    """What `int8run` needs to run, without the outputs of others; the weights are linked."""
    target.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "conf", target / "conf", ignore=ignored)
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=ignored)
    shutil.copytree(ROOT / "int8run", target / "int8run", symlinks=True, ignore=ignored)
    (target / "int8run" / "assets").symlink_to(ROOT / "int8run" / "assets")


def apply_block(what: str, text: str, root: Path) -> None:
    """Put one block of the page where it says."""
    action, _, name = what.partition(": ")
    file = root / name
    if action == "file":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    elif action == "append to":
        file.write_text(f"{file.read_text()}\n\n{text}")
    else:
        assert action == "replace in", f"a block of {PAGE.name} says {what!r}"
        removed = "".join(line[1:] + "\n" for line in text.splitlines() if line.startswith("-"))
        added = "".join(line[1:] + "\n" for line in text.splitlines() if line.startswith("+"))
        assert file.read_text().count(removed) == 1, f"{name} has no line {removed!r}"
        file.write_text(file.read_text().replace(removed, added))


@pytest.mark.slow
def test_the_examples_work_in_a_copy(tmp_path):
    copy_repository(tmp_path / "copy")
    blocks = read_blocks()
    for what, text in blocks:
        if what != "in the copy":
            apply_block(what, text, tmp_path / "copy")

    commands = [text.strip() for what, text in blocks if what == "in the copy"]
    assert len(commands) == 4, "an outlier method, a backend, a model family, a metric"
    for number, command in enumerate(commands):
        words = shlex.split(command)[1:]
        run = [sys.executable, "-m", "int8run", *words, *QUICK, f"hydra.run.dir=out/{number}"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "copy")}
        ended = subprocess.run(run, cwd=tmp_path / "copy", env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"

    layers = (tmp_path / "copy" / "out" / "0" / "layers.csv").read_text()
    assert "weight_balance" in layers
    layers = (tmp_path / "copy" / "out" / "1" / "layers.csv").read_text()
    assert "float_matmul" in layers
    layers = (tmp_path / "copy" / "out" / "2" / "layers.csv").read_text()
    assert "attention stays float" in layers
    metrics = (tmp_path / "copy" / "out" / "3" / "metrics.json").read_text()
    assert "quality/largest_error" in metrics
