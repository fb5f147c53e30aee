"""Write the generated pages: `python docs/generate.py`.

`settings.md` comes from the comments of `conf/`, `python_api.md` from the docstrings of the public API, and
`errors.md` from the messages in the code. A test compares them with what this script makes.
"""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import int8run
from int8run.config.help import (
    METRIC_TOPIC,
    PROMPT_SETTINGS,
    Group,
    Setting,
    list_measure_settings,
    list_options,
    read_description,
    read_groups,
    read_option_settings,
    read_own_settings,
)

DOCS = Path(__file__).parent
GENERATED = "<!-- Written by docs/generate.py. Change the {source} instead of this page. -->"
# classes have further methods, which the run uses; these are for programs of users
METHODS = {"LoraStack": ("add", "set_strength", "remove", "clear", "of")}
SHORT_TYPES = {
    "torch.nn.modules.module.Module": "nn.Module",
    "collections.abc.": "",
    "pathlib.": "",
    "torch.Tensor": "Tensor",
}
SECTION = re.compile(r"^(Args|Returns|Raises|Yields):$")
ITEM = re.compile(r"^(?P<names>[\w, `]+?): (?P<text>.*)$")

SETTINGS_INTRO = """\
A group picks an option (`backend=onednn`), a dotted key sets a value (`sampler.steps=8`).
`int8run --help GROUP` prints the same from the command line, `int8run --cfg job` the composed settings of a
command.
[First run](first_run.md) shows how to add options of your own."""

API_INTRO = """\
Settings have the words of the command line. Errors are those of `int8run.errors`, all of them `Int8RunError`.
[Coming from diffusers](coming_from.md#from-diffusers) has a whole program."""


def render_settings() -> str:
    """The page of all groups, options and keys, from the YAML files in `conf/`."""
    blocks = [
        "# Settings",
        GENERATED.format(source="comments in conf/"),
        SETTINGS_INTRO,
        "## Keys without a group",
        render_key_table([*PROMPT_SETTINGS, *read_own_settings()]),
    ]
    for group in read_groups():
        blocks += render_group(group)
        if group.name == "metrics":
            blocks += render_metrics()
    return "\n\n".join(blocks) + "\n"


def render_group(group: Group) -> list[str]:
    """One group: its options with their descriptions, and the keys that they have."""
    rows = ["| option | |", "|---|---|"]
    for name, file in list_options(group.name, group.default).items():
        suffix = " (default)" if name == group.default else ""
        rows.append(f"| `{name}`{suffix} | {escape_cell(read_description(file))} |")
    title = f"{group.description[:1].upper()}{group.description[1:]}."
    blocks = [f"## `{group.name}=`", title, "\n".join(rows)]

    known: set[str] = set()
    for name, settings in read_option_settings(group.name, group.default).items():
        further = [setting for setting in settings if setting.key not in known]
        # models and families repeat each other's keys: those of the first one that has a key stand for all
        if not further:
            continue
        known |= {setting.key for setting in further}
        if name != group.default:
            blocks.append(f"With `{group.name}={name}` and others that have them:")
        blocks.append(render_key_table(further))
    return blocks


def render_metrics() -> list[str]:
    """The metrics that `metrics.perceptual` can name, and their settings."""
    rows = ["| metric | |", "|---|---|"]
    for name, file in list_options(METRIC_TOPIC).items():
        rows.append(f"| `{name}` | {escape_cell(read_description(file))} |")
    title = "`metrics.perceptual` names any of these; [measuring](measuring.md) says what each needs."
    return [title, "\n".join(rows), render_key_table(list_measure_settings())]


def render_key_table(settings: list[Setting]) -> str:
    """A table of keys."""
    lines = ["| key | default | |", "|---|---|---|"]
    for setting in settings:
        shown = f"`{escape_cell(setting.value)}`" if setting.value else ""
        lines.append(f"| `{setting.key}` | {shown} | {escape_cell(setting.comment)} |")
    return "\n".join(lines)


def escape_cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def render_api() -> str:
    """The page of the public API, from signatures and docstrings."""
    blocks = ["# Python API", GENERATED.format(source="docstrings"), API_INTRO]
    for name in sorted(n for n in int8run.__all__ if not n.startswith("_")):
        thing = getattr(int8run, name)
        blocks += (
            render_class(thing) if inspect.isclass(thing) else render_function(thing, f"int8run.{name}", "##")
        )
    return "\n\n".join(blocks) + "\n"


def render_class(thing: type) -> list[str]:
    """A class: its docstring and the methods for users with theirs."""
    blocks = render_function(thing, f"int8run.{thing.__name__}", "##")
    for name in METHODS[thing.__name__]:
        blocks += render_function(getattr(thing, name), f"{thing.__name__}.{name}", "###")
    return blocks


def render_function(thing: Callable[..., object], name: str, heading: str) -> list[str]:
    """Heading, signature and docstring of a function or class."""
    signature = str(inspect.signature(thing)).replace("(self, ", "(").replace("(self)", "()")
    signature = signature.removesuffix(" -> None")
    signature = signature.replace("'LoraStack'", "LoraStack")
    for long, short in SHORT_TYPES.items():
        signature = signature.replace(long, short)
    return [
        f"{heading} `{name}`",
        f"```python\n{name.rpartition('.')[2]}{wrap_signature(signature)}\n```",
        render_docstring(inspect.getdoc(thing) or ""),
    ]


def wrap_signature(signature: str) -> str:
    """A long signature with one parameter per line."""
    if len(signature) < 80:
        return signature
    inner, _, result = signature.removeprefix("(").rpartition(")")
    parameters = re.split(r", (?=\*?\*?\w+(?::|=|,|$)|\*,)", inner)
    return "(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + ")" + result


def render_docstring(text: str) -> str:
    """Google's sections as lists, everything else as it is."""
    lines: list[str] = []
    current = ""  # name of the section that the line is in
    for line in text.splitlines():
        section = SECTION.match(line)
        item = ITEM.match(line.strip())
        is_item = line.startswith("    ") and not line.startswith("     ")
        if section:
            current = section[1]
            lines += [f"**{current}**", ""]
        elif current == "Returns":
            lines.append(line.strip())
        elif current and is_item and item:
            lines.append(f"- `{item['names']}`: {item['text']}")
        elif current and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines).strip()


# errors that users meet, with the exit code of the command; others are mistakes in a program
EXIT_CODES = {"ConfigError": 2, "FileError": 3, "LoraError": 3, "BackendError": 4, "TrackingError": 1}
PACKAGE = Path(int8run.__file__).parent

ERRORS_INTRO = """\
Every error is one line that says what was wrong, what is allowed and what to do. Here are the messages, by
the folder of the code that raises them; … stands for names and numbers of your run. `INT8RUN_DEBUG=1` shows
where an error comes from. [Troubleshooting](troubleshooting.md) explains the common ones."""


def render_errors() -> str:
    """The page of all error messages, from the `raise` statements of the package."""
    blocks = ["# Error messages", GENERATED.format(source="messages in the code"), ERRORS_INTRO]
    messages: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        folder = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for error_class, message in find_messages(file):
            row = f"| {escape_cell(message)} | {EXIT_CODES[error_class]} |"
            messages.setdefault(folder, []).append(row)
    for folder, rows in messages.items():
        unique_rows = list(dict.fromkeys(rows))
        blocks += [f"## {folder}", "\n".join(["| message | exit code |", "|---|---|", *unique_rows])]
    return "\n\n".join(blocks) + "\n"


def find_messages(file: Path) -> list[tuple[str, str]]:
    """(error class, message) of every `raise` in a file whose message stands there, in the file's order."""
    found = []
    raises = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Raise)]
    for node in sorted(raises, key=lambda node: node.lineno):
        call = node.exc
        is_named_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if not is_named_call or call.func.id not in EXIT_CODES or not call.args:
            continue
        message = format_message(call.args[0])
        if len(message.replace("…", "").strip(" :;")) > 8:  # a message made elsewhere is only placeholders
            found.append((call.func.id, message))
    return found


def format_message(node: ast.expr) -> str:
    """The text of a message, with … for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(format_message(part) for part in node.values)
    return "…"


PAGES = {"settings.md": render_settings, "python_api.md": render_api, "errors.md": render_errors}


def main() -> None:
    """Write all of them."""
    for name, render in PAGES.items():
        (DOCS / name).write_text(render())


if __name__ == "__main__":
    main()
