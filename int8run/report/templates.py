"""HTML templates and what lies beside them; every page of int8run is made from one.

A template knows nothing of runs; what is in a page is collected by `html_page`, `audit_page` and `atlas`.
"""

import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from int8run.utils.paths import check_replaceable
from int8run.utils.text import make_lines_visible

TEMPLATE_FOLDER = Path(__file__).parent


def load_template(name: str) -> Template:
    """A template beside this file: text is escaped, an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        finalize=show_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def show_text(value: object) -> object:
    """What an expression of the template prints: what a page would obey in a text of a user is shown.

    Marks that turn the direction of writing reach beyond their own cell. What the template marks as safe
    stays as it is: plots and images.
    """
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return make_lines_visible(str(value)) if is_text else value


def read_asset(name: str) -> str:
    """The text of a file beside this one."""
    return (TEMPLATE_FOLDER / name).read_text(encoding="utf-8")


def write_text_file(path: Path, text: str) -> None:
    """Write a page or a table whole or not at all; its folder is made where it is missing.

    Raises:
        OSError: something else than a file is there.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
