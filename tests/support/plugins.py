"""Installs packages as plug-ins for one test: as pip would, in a folder on the import path."""

import importlib
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8run.config import plugins

EXAMPLE = Path(__file__).parents[1] / "data" / "example_plugin"


def install_package(source: Path, target: Path) -> None:
    """Put a package, and what pip notes about it, into a folder."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    for folder in source.iterdir():
        if folder.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(folder, target / folder.name, dirs_exist_ok=True, ignore=ignored)
    note = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    note.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (note / "METADATA").write_text(metadata)
    lines = []
    for group, entries in project.get("entry-points", {}).items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {value}" for name, value in entries.items()]
    (note / "entry_points.txt").write_text("\n".join(lines) + "\n")


@contextmanager
def installed_in(folder: Path) -> Iterator[None]:
    """Let Python find what is installed in a folder; afterwards it is forgotten."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    plugins.load_plugin.cache_clear()
    known = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        plugins.load_plugin.cache_clear()
        for name in set(sys.modules) - known:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
