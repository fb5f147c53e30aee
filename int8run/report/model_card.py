"""The model card of a checkpoint: what it is, how it was made, what was measured, as Markdown.

`tasks.model_card` collects the facts and writes the file beside what `save=` wrote; `tasks.publish` puts the
same text below the front matter of a repository's README.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from int8run.metrics.names import DTYPE_FLOOR, HIGH, LOW, NOISE_FLOOR
from int8run.report.columns import MISSING, PSNR_DB, MetricColumn, find_column
from int8run.report.markdown import escape_markdown, join_markdown_row
from int8run.report.runs_table import list_columns
from int8run.report.step_times import SCATTER_NOTE, has_scattered_times
from int8run.utils.plurals import count_noun
from int8run.utils.text import make_lines_visible, make_visible

# a metric of the INT8 model -> the same of the float model, which stands beside it
FLOAT_METRICS: Mapping[str, str] = {
    "speed/step_ms_p50": "float/step_ms_p50",
    "speed/images_per_s": "float/images_per_s",
    "speed/frames_per_s": "float/frames_per_s",
    "memory/denoiser_bytes": "float/denoiser_bytes",
    "energy/joules_per_image": "float/joules_per_image",
}
LICENSE_ROW = "license of the base"
NOT_MEASURED = (
    "Nothing was measured: the file was written from the weights alone. A run with it, as below, compares it "
    "with the float model."
)


@dataclass(frozen=True)
class CardFile:
    """A file of the checkpoint.

    Args:
        name: as it is called beside the card.
        nbytes: its size.
    """

    name: str
    nbytes: int


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Args:
        title: of the card.
        version: of int8run.
        base: the float checkpoint, as a hub id or a name.
        license_name: of the base; `unknown` where it is not known.
        license_origin: where that is said, or why it is not known.
        files: of the checkpoint.
        made: how it was made, as name and text.
        command: that makes it again.
        metrics: by their names; empty where nothing was measured.
        num_samples: that were compared.
        machine: that measured.
        grid: file name of the image grid beside the card; None: there is none.
        usage: lines of a shell that use the checkpoint.
        sample_noun: what a sample is: image or video.
    """

    title: str
    version: str
    base: str
    license_name: str
    license_origin: str
    files: Sequence[CardFile]
    made: Sequence[tuple[str, str]]
    command: str
    metrics: Mapping[str, float]
    num_samples: int
    machine: str
    grid: str | None
    usage: Sequence[str]
    sample_noun: str = "image"


def render_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    lines = [f"# {escape_markdown(facts.title)}", ""]
    base = escape_markdown(facts.base)
    lines.append(f"INT8 version of {base}, made with int8run {escape_markdown(facts.version)}.")
    lines += ["", "| | |", "|---|---|"]
    lines += [
        render_fact("base", facts.base),
        render_license(facts.license_name, facts.license_origin),
    ]
    lines += [render_fact("file", f"{file.name}, {file.nbytes / 1e6:.1f} MB") for file in facts.files]
    lines += [render_fact(name, text) for name, text in facts.made]
    lines += ["", "## Measured", "", *render_measured(facts)]
    lines += ["", "## How it was made", "", *render_code([facts.command])]
    lines += ["", "## How to use it", "", *render_code(facts.usage)]
    return "\n".join(lines) + "\n"


def render_fact(name: str, text: str) -> str:
    """A row of the table at the top."""
    return join_markdown_row([escape_markdown(name), escape_markdown(text)])


def render_license(name: str, origin: str) -> str:
    """The row of the license of the base."""
    return render_fact(LICENSE_ROW, f"{name} ({origin})")


def replace_license(card: str, name: str, origin: str) -> str:
    """A card with another license of the base, as one that was not known when it was written.

    Args:
        card: as Markdown.
        name: of the license.
        origin: where that is said.
    """
    lines = card.split("\n")
    for place, line in enumerate(lines):
        if line.startswith(f"| {LICENSE_ROW} |"):
            lines[place] = render_license(name, origin)
            break
    return "\n".join(lines)


def render_measured(facts: CardFacts) -> list[str]:
    """The section of the numbers, each with its interval where it has one, and the grid."""
    rows = [row for column in list_card_columns() for row in build_metric_row(column, facts.metrics)]
    if not rows:
        return [NOT_MEASURED]
    samples = count_noun(facts.num_samples, facts.sample_noun)
    machine = facts.machine or "a machine that is not known"
    lines = [
        f"Against the float model with the same prompts, seeds and settings: {samples}, on "
        f"{escape_markdown(machine)}.",
        "",
        "| | float | INT8 | interval |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(join_markdown_row([escape_markdown(text) for text in row]))
    if has_scattered_times(facts.metrics):
        lines += ["", SCATTER_NOTE]
    if not any(row[3] for row in rows):
        lines += ["", "No interval was measured: the numbers are observations of these prompts alone."]
    if facts.grid is not None:
        lines += ["", f"![float, INT8 and their difference]({escape_link(facts.grid)})"]
    return lines


def list_card_columns() -> list[MetricColumn]:
    """All metrics of a report, and what the float model differs from itself by, as rows of a card."""
    columns = list_columns()
    psnr = find_column(PSNR_DB)
    place = columns.index(psnr) + 1
    floors = {NOISE_FLOOR: "of float, computed otherwise", DTYPE_FLOOR: "of float in another dtype"}
    for metric, heading in floors.items():
        columns.insert(place, replace(psnr, metric=metric, heading=f"{psnr.heading} {heading}"))
    return columns


def build_metric_row(column: MetricColumn, metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """The row of a metric: heading, float, INT8, interval; none where it was not measured."""
    value = metrics.get(column.metric)
    if value is None:
        return []
    float_value = metrics.get(FLOAT_METRICS.get(column.metric, ""))
    known = [number for number in (value, float_value) if number is not None]
    decimals = column.choose_decimals(known)
    float_text = "" if float_value is None else column.format(float_value, decimals)
    low, high = metrics.get(column.metric + LOW), metrics.get(column.metric + HIGH)
    interval = ""
    if low is not None and high is not None:
        interval = f"{column.format(low, decimals)} to {column.format(high, decimals)}"
    heading = " ".join(column.heading.split())
    return [(heading, float_text, column.format(value, decimals) or MISSING, interval)]


def render_code(commands: Sequence[str]) -> list[str]:
    """Commands as a block of code, with a fence that is longer than any in them."""
    text = make_lines_visible("\n".join(commands))
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}bash", *text.splitlines(), fence]


def escape_link(name: str) -> str:
    """A file name as the target of a link."""
    shown = make_visible(name)
    return f"<{shown}>" if set(shown) & set(" ()") else shown
