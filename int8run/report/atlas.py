"""The atlas: results of any number of people and machines on one page, model × recipe × device.

`tasks.report` calls `write_atlas`. A cell that nobody measured stays grey: nothing is estimated.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from int8run.metrics.names import HIGH, LOW
from int8run.metrics.sample_statistics import compute_median
from int8run.report.columns import DENOISER_RATIO, PSNR_DB, SPEED_RATIO, MetricColumn, find_column
from int8run.report.export_table import escape_latex, format_plain, join_latex_row, show_in_spreadsheet
from int8run.report.markdown import escape_markdown, join_markdown_row
from int8run.report.shared_results import ResultCollection, SharedResult
from int8run.report.step_times import has_scattered_times
from int8run.report.templates import load_template, read_asset, write_text_file
from int8run.utils.plurals import count_noun
from int8run.utils.text import make_visible

ENERGY = "energy/joules_per_image"
# what a cell shows, in this order
SHOWN_METRICS = (SPEED_RATIO, PSNR_DB, DENOISER_RATIO, ENERGY)
NOT_MEASURED = "not measured"
SCATTERED = "?"  # behind a speed that says little
SCATTERED_NOTE = (
    "? behind a speed: step times of a result scatter by more than twice, so that it says little."
)


@dataclass(frozen=True)
class AtlasNumber:
    """A number of a cell: the median of its results.

    Args:
        label: of the metric.
        text: the number, with its interval where one result has it, or its range where several differ.
    """

    label: str
    text: str


@dataclass(frozen=True)
class AtlasCell:
    """What is known of a recipe on a device; without results it is grey.

    Args:
        results: of it.
        numbers: that are shown.
    """

    results: Sequence[SharedResult]
    numbers: Sequence[AtlasNumber]

    @property
    def note(self) -> str:
        """How much stands behind the numbers: `2 results, 12 images`."""
        images = sum(result.num_samples for result in self.results)
        return f"{count_noun(len(self.results), 'result')}, {count_noun(images, 'image')}"


@dataclass(frozen=True)
class AtlasModel:
    """The table of one model.

    Args:
        name: of the checkpoint.
        rows: recipe and a cell for each device of the atlas.
    """

    name: str
    rows: Sequence[tuple[str, Sequence[AtlasCell]]]


@dataclass(frozen=True)
class Atlas:
    """All tables.

    Args:
        devices: the columns of every table.
        models: the tables.
        collection: what they are made from.
    """

    devices: Sequence[str]
    models: Sequence[AtlasModel]
    collection: ResultCollection

    @property
    def has_scattered(self) -> bool:
        """Whether any speed is marked as one that says little."""
        return any(map(has_scattered_ratio, self.collection.results))


def build_atlas(collection: ResultCollection) -> Atlas:
    """Sort the results into tables; models, recipes and devices in the order of their names."""
    results = collection.results
    devices = sorted({result.device for result in results})
    models = []
    for model in sorted({result.model for result in results}):
        own = [result for result in results if result.model == model]
        rows = []
        for recipe in sorted({result.recipe for result in own}):
            cells = []
            for device in devices:
                found = [result for result in own if result.recipe == recipe and result.device == device]
                cells.append(build_cell(found))
            rows.append((recipe, cells))
        models.append(AtlasModel(model, rows))
    return Atlas(devices, models, collection)


def build_cell(results: Sequence[SharedResult]) -> AtlasCell:
    """The numbers of some results of one recipe on one device."""
    numbers = []
    for metric in SHOWN_METRICS:
        values = [result.metrics[metric] for result in results if metric in result.metrics]
        if values:
            column = find_column(metric)
            label = " ".join(column.heading.split())
            text = format_number(column, values, results)
            if metric == SPEED_RATIO and any(map(has_scattered_ratio, results)):
                text = f"{text} {SCATTERED}"
            numbers.append(AtlasNumber(label, text))
    return AtlasCell(results, numbers)


def has_scattered_ratio(result: SharedResult) -> bool:
    """Whether a result has a speed that says little."""
    return SPEED_RATIO in result.metrics and has_scattered_times(result.metrics)


def format_number(column: MetricColumn, values: Sequence[float], results: Sequence[SharedResult]) -> str:
    """The median of some values, with their range; of one value with its interval."""
    decimals = column.choose_decimals(values)
    text = column.format(compute_median(values), decimals)
    ends = (min(values), max(values))
    if len(values) == 1:
        (metrics,) = [result.metrics for result in results if column.metric in result.metrics]
        if column.metric + LOW not in metrics or column.metric + HIGH not in metrics:
            return text
        ends = (metrics[column.metric + LOW], metrics[column.metric + HIGH])
    low, high = (column.format(end, decimals) for end in ends)
    return text if low == high == text else f"{text} [{low}, {high}]"


# -- formats -------------------------------------------------------------------------------------------------


def write_atlas(collection: ResultCollection, path: Path, table_format: str) -> None:
    """Write the atlas.

    Args:
        collection: of results.
        path: of the file.
        table_format: `html`, `markdown`, `latex` or `csv`.
    """
    renderers: Mapping[str, Callable[[Atlas], str]] = {
        "html": render_html,
        "markdown": render_markdown,
        "latex": render_latex,
        "csv": render_csv,
    }
    write_text_file(path, renderers[table_format](build_atlas(collection)))


def render_html(atlas: Atlas) -> str:
    """A page that needs no other file."""
    return load_template("atlas.html.jinja").render(
        atlas=atlas,
        style="\n".join([read_asset("page.css"), read_asset("atlas.css")]),
        script=read_asset("page.js"),
        not_measured=NOT_MEASURED,
        scattered_note=SCATTERED_NOTE,
    )


def render_markdown(atlas: Atlas) -> str:
    """A heading and a table for each model."""
    lines = ["# Atlas of results"]
    for model in atlas.models:
        lines += ["", f"## {escape_markdown(model.name)}", ""]
        lines.append(join_markdown_row(["recipe", *map(escape_markdown, atlas.devices)]))
        lines.append(join_markdown_row(["---"] * (1 + len(atlas.devices))))
        for recipe, cells in model.rows:
            texts = [escape_markdown(join_cell(cell)) for cell in cells]
            lines.append(join_markdown_row([escape_markdown(recipe), *texts]))
    if atlas.has_scattered:
        lines += ["", SCATTERED_NOTE]
    return "\n".join(lines) + "\n"


def render_latex(atlas: Atlas) -> str:
    """A `tabular` for each model."""
    lines = [r"% \usepackage{booktabs}"]
    for model in atlas.models:
        columns = "l" * (1 + len(atlas.devices))
        lines += [f"% {make_visible(model.name)}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [join_latex_row(["recipe", *map(escape_latex, atlas.devices)]), r"\midrule"]
        for recipe, cells in model.rows:
            texts = [escape_latex(join_cell(cell)) for cell in cells]
            lines.append(join_latex_row([escape_latex(recipe), *texts]))
        lines += [r"\bottomrule", r"\end{tabular}"]
    if atlas.has_scattered:
        lines.append(f"% {SCATTERED_NOTE}")
    return "\n".join(lines) + "\n"


def join_cell(cell: AtlasCell) -> str:
    """A cell in one line: `speed × float 1.52×, PSNR dB 41.3`."""
    if not cell.results:
        return NOT_MEASURED
    return ", ".join(f"{number.label} {number.text}" for number in cell.numbers)


def render_csv(atlas: Atlas) -> str:
    """A line for each result, with plain numbers by the names of all metrics."""
    results = atlas.collection.results
    names = sorted({name for result in results for name in result.metrics})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["model", "recipe", "device", "images", "int8run", *map(show_in_spreadsheet, names)])
    for result in results:
        texts = [result.model, result.recipe, result.device, str(result.num_samples), result.version]
        numbers = [format_plain(result.metrics.get(name)) for name in names]
        writer.writerow([*map(show_in_spreadsheet, texts), *numbers])
    return buffer.getvalue()
