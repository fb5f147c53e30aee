"""The pages: every link leads somewhere, every command composes and runs, generated pages are current."""

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.cli_process import command_in

from int8run.config.compose import compose_jobs, create_run_spec, int8run_options
from int8run.config.prompt_argument import rewrite_prompt_arguments
from int8run.config.unquoted_values import quote_keep_blocks
from int8run.pipeline import process_cache

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(
    r"^(?P<marker><!-- (?:needs|in) [a-z ]+ -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INDENTED = re.compile(
    r"^(?P<marker><!-- (?:needs|in) [a-z ]+ -->\n)?(?P<text>(?:    int8run[^\n]*\n)+)", re.MULTILINE
)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
README_WORDS = 1200
# a page writes this file with one command and reads it with the next
READS_TINY_INT8 = re.compile(r"(checkpoint|task\.path)=tiny-int8\.safetensors")


@dataclass(frozen=True)
class Command:
    """One `int8run ...` line of a page."""

    page: str
    line: str
    needs: str  # what the page says it needs: weights, a cluster, the copy of extending.md; empty: nothing

    @property
    def arguments(self) -> list[str]:
        """Words after `int8run`, as the shell splits them."""
        return shlex.split(self.line, comments=True)[1:]


def find_commands() -> list[Command]:
    """Every command in a code block of a page."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in [*FENCE.finditer(text), *INDENTED.finditer(text)]:
            needs = (block["marker"] or "").removeprefix("<!-- ").removesuffix(" -->\n")
            lines = [line.strip() for line in block["text"].splitlines()]
            commands = [line for line in lines if line.startswith("int8run ") or line == "int8run"]
            found += [Command(page.name, line, needs) for line in commands]
    return found


# tests/docs/test_extending.py runs those of the copy
COMMANDS = [command for command in find_commands() if command.needs != "in the copy"]


def name_command(command: Command) -> str:
    return f"{command.page}: {command.line[:60]}"


def get_heading_anchors(page: Path) -> set[str]:
    """What `page.md#anchor` may name, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_the_pages_have_commands():
    pages = {command.page for command in COMMANDS}

    assert {"README.md", "first_run.md", "models.md", "sweeps.md", "clusters.md"} <= pages
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page

        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in get_heading_anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("command", COMMANDS, ids=name_command)
def test_every_command_composes(command):
    arguments = command.arguments
    is_sweep = "-m" in arguments
    overrides = quote_keep_blocks(rewrite_prompt_arguments([word for word in arguments if word != "-m"]))
    if any(word.startswith("--") for word in overrides):
        pytest.skip("a flag of hydra, which runs no job")

    jobs = [overrides]
    if is_sweep:
        parsed = OverridesParser.create().parse_overrides(overrides)
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    with int8run_options():
        for job in jobs[:2]:
            _, configs = compose_jobs(job)
            create_run_spec(configs[0])


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.needs], ids=name_command)
def test_every_command_that_needs_nothing_runs(command, tmp_path, monkeypatch, capsys):
    if "--shell-completion" in command.line or "--config-dir" in command.line:
        pytest.skip("changes the shell, or needs a folder of the reader's")

    process_cache.clear()  # a model that an earlier command built is not saved again
    with command_in(tmp_path / "here", monkeypatch, capsys) as int8run:
        if READS_TINY_INT8.search(command.line):
            assert int8run("save=tiny-int8.safetensors", "tracker=none", "sampler.steps=2").code == 0

        ended = int8run(*command.arguments)

        assert ended.code == 0, ended.err


def test_the_readme_is_short():
    words = len((ROOT / "README.md").read_text().split())

    assert words <= README_WORDS


@pytest.mark.parametrize("name", ["settings.md", "python_api.md", "errors.md"])
def test_generated_pages_are_current(name):
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)

    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), "run: python docs/generate.py"


PATH = re.compile(r"`(?P<path>(?:int8run|conf|kernels|tests)/[\w/.]+?)(?:::(?P<name>\w+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_definition_that_is_named_exists(page):
    for found in PATH.finditer(page.read_text()):
        path = ROOT / found["path"]
        if "weight_balance" in found["path"] or "float_matmul" in found["path"]:
            continue  # files that the reader makes

        assert path.exists(), f"{page.name} names {found['path']}"
        if found["name"]:
            definition = re.compile(rf"^(?:class|def) {found['name']}\b", re.MULTILINE)
            assert definition.search(path.read_text()), f"{page.name} names {found[0]}"


def test_quoted_messages_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    messages = [(ROOT / "docs" / "errors.md").read_text()]
    messages += [file.read_text() for file in (ROOT / "int8run").rglob("*.py")]
    source = re.sub(r'["\']\s*f?["\']', "", "\n".join(messages))

    assert len(quoted) > 15
    for message in quoted:
        for part in re.split(r"…|=\w+\b|'[\w.]+'", message):
            words = part.strip(" ;:()")
            if len(words) > 8:
                assert words in source, f"troubleshooting.md quotes {words!r}, which no message says"
