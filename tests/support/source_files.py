"""The package's source files and what they import, each file parsed once."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2]
# int8run/conf and int8run/kernels are links to the folders at the top, which rglob does not follow
FILES = sorted(file for folder in ("int8run", "kernels", "conf") for file in (ROOT / folder).rglob("*.py"))


@functools.cache
def parse_file(file: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(file.read_text())


@functools.cache
def find_imports(file: Path) -> frozenset[str]:
    """Full names of what a file imports, inside functions too; `from int8run import x` is `int8run.x`."""
    names: set[str] = set()
    for node in ast.walk(parse_file(file)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{get_name(file)}:{node.lineno} has a relative import"
            if node.module == "int8run":
                names.update(f"int8run.{alias.name}" for alias in node.names)
            else:
                names.add(node.module)
    return frozenset(names)


@functools.cache
def find_libraries(file: Path) -> frozenset[str]:
    """The top-level packages that a file imports."""
    return frozenset(name.split(".")[0] for name in find_imports(file))


@functools.cache
def find_own_imports(file: Path) -> frozenset[str]:
    """What a file imports of int8run, without the `int8run.` in front.

    Not the version, a constant of the package itself, which every import of a module runs first.
    """
    own = [name for name in find_imports(file) if name.startswith("int8run.")]
    return frozenset(name.removeprefix("int8run.") for name in own if name != "int8run.__version__")


def get_part(file: Path) -> str:
    """The folder or top-level module that a file belongs to."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "int8run" else parts[0]


def get_name(file: Path) -> str:
    """A file's path from the root of the repository."""
    return file.relative_to(ROOT).as_posix()
