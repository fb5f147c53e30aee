"""The tables that end a command: the result of one run beside the float model, and the jobs of a sweep.

Builds rich tables from metrics and records; printing is the caller's.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich import box, get_console
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from int8run.report.columns import (
    DENOISER_BYTES,
    LATENT_ERROR,
    MISSING,
    PSNR_DB,
    SAME_FILE_LAYERS,
    SAME_FILE_LIMITS,
    SPEED_RATIO,
    STEP_MS,
    find_column,
)
from int8run.report.console import make_plain
from int8run.report.formatting import format_decibels, format_megabytes, shorten_to_width
from int8run.report.missing_metrics import explain_missing
from int8run.tracking.run_record import FINISHED, Record, shorten_keys, split_override
from int8run.utils.text import make_visible

SAME_FILE_NOTE = f"float has numbers of the same quantized file: PSNR to it {SAME_FILE_LIMITS}"

Format = Callable[[float], str]
Ratio = Callable[[float, float], float]


# -- one run -------------------------------------------------------------------------------------------------


def build_result_table(
    title: str, metrics: Mapping[str, float], candidate: str, *, has_both_models: bool = True
) -> Table:
    """The float model beside the candidate with their ratio, then quality and layers.

    What was not measured has no row.

    Args:
        title: of the table.
        metrics: of the run.
        candidate: head of the candidate's column, such as `INT8`.
        has_both_models: whether both were in memory at once, which the peak memory of each includes.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("", style="bold")
    table.add_column("float", justify="right")
    table.add_column(candidate, justify="right")
    table.add_column("ratio", style="green", justify="right")

    rows = ResultRows(table, metrics, has_both_models)
    rows.add_speed_and_memory()
    rows.add_embeddings()
    rows.add_quality()
    rows.add_layers()
    rows.add_loras()
    return table


@dataclass(frozen=True)
class ResultRows:
    """Adds the rows of a result table, section by section."""

    table: Table
    metrics: Mapping[str, float]
    has_both_models: bool

    def add_speed_and_memory(self) -> None:
        """Times, rates and sizes, each with the float model's."""
        self.add_comparison("step, median", "speed/step_ms_p50", format_milliseconds, divide_float)
        self.add_comparison("step, 90 %", "speed/step_ms_p90", format_milliseconds, divide_float)
        samples = "videos" if "speed/frames_per_s" in self.metrics else "images"
        self.add_comparison(f"{samples} per second", "speed/images_per_s", "{:.2f}".format, divide_by_float)
        self.add_comparison("frames per second", "speed/frames_per_s", "{:.2f}".format, divide_by_float)
        self.add_comparison("denoiser memory", "memory/denoiser_bytes", format_megabytes, divide_float)
        self.add_peak_memory()
        if "memory/text_encoder_ratio" in self.metrics:
            self.add_comparison(
                "text encoder memory", "memory/text_encoder_bytes", format_megabytes, divide_float
            )

    def add_peak_memory(self) -> None:
        """Largest memory while each model generated; a ratio only where each was alone."""
        peak, float_peak = "memory/peak_bytes", self.metrics.get("float/peak_bytes")
        if self.has_both_models and float_peak is not None:
            self.add_comparison("peak memory, both loaded", peak, format_megabytes, ratio=None)
        else:
            self.add_comparison("peak memory", peak, format_megabytes, divide_float)

    def add_embeddings(self) -> None:
        """How far the text encoders' embeddings are from the float ones."""
        if "clip/cosine_mean" not in self.metrics:
            return
        mean, least = self.metrics["clip/cosine_mean"], self.metrics["clip/cosine_min"]
        self.table.add_section()
        self.add_row("embedding cosine, mean / min", f"{mean:.5f} / {least:.5f}")
        self.add_row("embedding error", format_percent(self.metrics["clip/rel_err"]))

    def add_quality(self) -> None:
        """How far the images are from the float model's."""
        if "quality/psnr_db" not in self.metrics:
            return
        self.table.add_section()
        self.add_value("PSNR to float", "quality/psnr_db", format_decibels)
        if SAME_FILE_LAYERS in self.metrics:
            self.add_value("float layers of the same file", SAME_FILE_LAYERS, "{:.0f}".format)
            self.table.caption = SAME_FILE_NOTE
        self.add_value("SSIM to float", "quality/ssim", "{:.4f}".format)
        self.add_value("MS-SSIM to float", "quality/ms_ssim", "{:.4f}".format)
        self.add_value("LPIPS to float", "quality/lpips", "{:.4f}".format)
        self.add_value("EfficientNet distance", "quality/effnet_distance", "{:.5f}".format)
        self.add_comparison("CLIP score", "quality/clip_score", "{:.2f}".format, ratio=None)
        self.add_value("latent error", "quality/latent_rel_err", format_percent)
        if self.metrics.get("quality/half_error_step"):
            self.add_value("half of the error by step", "quality/half_error_step", "{:.0f}".format)

    def add_layers(self) -> None:
        """How many layers are INT8, and how exact they are."""
        if "quant/layers_int8" not in self.metrics:
            return
        num_float, num_int8 = self.metrics["quant/layers_float"], self.metrics["quant/layers_int8"]
        self.table.add_section()
        self.add_row("Linear layers, float / INT8", f"{num_float:.0f} / {num_int8:.0f}")
        if self.metrics["quant/fallback_layers"]:
            self.add_value("small-batch fallback", "quant/fallback_layers", "{:.0f}".format)
        if "quant/output_sqnr_db_mean" in self.metrics:
            mean, least = self.metrics["quant/output_sqnr_db_mean"], self.metrics["quant/output_sqnr_db_min"]
            self.add_row("layer SQNR, mean / min", f"{mean:.1f} / {least:.1f} dB")

    def add_loras(self) -> None:
        """What the LoRAs change and cost."""
        self.add_value("LoRA modules matched", "lora/modules_matched", "{:.0f}".format)
        self.add_value("step time with LoRA branch", "lora/overhead_ratio", "{:.2f}×".format)

    def add_comparison(self, label: str, metric: str, form: Format, ratio: Ratio | None) -> None:
        """A metric of the candidate beside `float/<name>`.

        Args:
            label: of the row.
            metric: of the candidate.
            form: how both are shown.
            ratio: of (float, candidate); None: not shown.
        """
        value = self.metrics.get(metric)
        if value is None:
            return
        _, _, name = metric.rpartition("/")
        float_value = self.metrics.get(f"float/{name}")
        if float_value is None:
            self.table.add_row(label, MISSING, form(value), "")
            return
        ratio_text = ""
        if ratio is not None and float_value and value:
            ratio_text = f"{ratio(float_value, value):.2f}×"
        self.table.add_row(label, form(float_value), form(value), ratio_text)

    def add_value(self, label: str, metric: str, form: Format) -> None:
        """A metric that only the candidate has; no row where it is missing."""
        if metric in self.metrics:
            self.add_row(label, form(self.metrics[metric]))

    def add_row(self, label: str, text: str) -> None:
        """A row with a text in the candidate's column."""
        self.table.add_row(label, "", text, "")


def divide_float(float_value: float, value: float) -> float:
    """The ratio of what one wants less of: how many times smaller it is than float's."""
    return float_value / value


def divide_by_float(float_value: float, value: float) -> float:
    """The ratio of what one wants more of: how many times larger it is than float's."""
    return value / float_value


def format_milliseconds(value: float) -> str:
    """`5.2 ms`."""
    return f"{value:.1f} ms"


def format_percent(share: float) -> str:
    """A share in percent: `0.54 %`."""
    return f"{100 * share:.2f} %"


# -- the jobs of a sweep -------------------------------------------------------------------------------------


# Shown as in the report. The most important first: a narrow terminal has room for some of them.
SWEEP_METRICS = (PSNR_DB, SPEED_RATIO, STEP_MS, DENOISER_BYTES, LATENT_ERROR)
COLUMN_GAP = 3  # characters between two columns, as rich draws them
MAX_SETTING_WIDTH = 40  # characters; a longer value is shortened in its middle
MIN_SETTING_WIDTH = 6  # a setting that would be shortened further has no column


@dataclass(frozen=True)
class TextColumn:
    """One column of a table as text.

    Args:
        title: its head; it may be broken between words.
        cells: of every row.
        is_number: whether it stands to the right and is never shortened.
        style: of its cells.
    """

    title: str
    cells: Sequence[str]
    is_number: bool = False
    style: str = ""

    @property
    def width(self) -> int:
        """That of its widest cell, and of the longest word of its head."""
        return max(map(cell_len, [*self.cells, *self.title.split()]), default=0)

    def shorten(self, max_width: int) -> "TextColumn":
        """The same column with its texts shortened to a width."""
        cells = [shorten_to_width(cell, max_width) for cell in self.cells]
        return replace(self, title=shorten_to_width(self.title, max_width), cells=cells)


def build_sweep_table(records: Sequence[Record], varying: Sequence[str]) -> Table:
    """The jobs of a sweep, a line each, with as much as the terminal has room for.

    The number of a job is always shown, and so are the first metric and, where not all jobs are finished, its
    state. Metrics are shown whole or not at all; settings share what room there is, and those without room
    are named below the table.

    Args:
        records: of the jobs.
        varying: the settings that differ between them, by their names on the command line.
    """
    width = get_console().width
    number = TextColumn("job", [str(record.number) for record in records], is_number=True)
    states = list_states(records)
    metrics = build_metric_columns(records)
    settings = build_setting_columns(records, varying)

    fixed = [number, *states]
    while len(metrics) > 1 and measure_columns([*fixed, *settings, *metrics]) > width:
        metrics.pop()
    room = width - measure_columns([*fixed, *metrics])
    shown, left_out = fit_settings(settings, room)
    notes = [*describe_left_out(left_out), *explain_empty_cells(records, num_metrics=len(metrics))]
    return build_text_table([number, *shown, *metrics, *states], caption="\n".join(notes))


def build_metric_columns(records: Sequence[Record]) -> list[TextColumn]:
    """A column for each metric that a job has, headed and written as in the report."""
    columns = []
    for metric in list_shared_metrics(records):
        values = [get_number(record, metric) for record in records]
        column = find_column(metric)
        decimals = column.choose_decimals([value for value in values if value is not None])
        cells = [column.format(value, decimals) for value in values]
        columns.append(TextColumn(column.heading, cells, is_number=True))
    return columns


def get_number(record: Record, metric: str) -> float | None:
    """A metric of a job; None where it is missing or NaN."""
    value = record.metrics.get(metric)
    if value is None or math.isnan(value):
        return None
    return value


def list_states(records: Sequence[Record]) -> list[TextColumn]:
    """The column of states; none where all jobs are finished."""
    states = ["" if record.state == FINISHED else record.state for record in records]
    return [TextColumn("", states, style="red")] if any(states) else []


def build_setting_columns(records: Sequence[Record], varying: Sequence[str]) -> list[TextColumn]:
    """A column for each setting, headed by the shortest name that no other one has."""
    settings = [dict(map(split_override, record.overrides)) for record in records]
    columns = []
    for key, title in shorten_keys(varying).items():
        cells = [make_visible(values.get(key, "")) for values in settings]
        column = TextColumn(make_visible(title), cells, style="bold")
        columns.append(column.shorten(MAX_SETTING_WIDTH))
    return columns


def fit_settings(columns: Sequence[TextColumn], room: int) -> tuple[list[TextColumn], list[TextColumn]]:
    """Settings that share some room: the widest are shortened first, to the same width.

    Args:
        columns: the settings.
        room: in characters.

    Returns:
        The columns with room, and those without any.
    """
    num_shown = 0
    least_room = 0
    for column in columns:
        least_room += column.shorten(MIN_SETTING_WIDTH).width + COLUMN_GAP
        if least_room > room:
            break
        num_shown += 1
    shown, left_out = columns[:num_shown], columns[num_shown:]

    limit = choose_width_limit([column.width for column in shown], room - COLUMN_GAP * num_shown)
    return [column.shorten(limit) for column in shown], list(left_out)


def choose_width_limit(widths: Sequence[int], room: int) -> int:
    """The width to which settings are shortened, so that all of them have room together.

    Args:
        widths: of the columns, in characters.
        room: for their texts, in characters.
    """
    limit = MAX_SETTING_WIDTH
    while limit > MIN_SETTING_WIDTH and sum(min(width, limit) for width in widths) > room:
        limit -= 1
    return limit


def describe_left_out(columns: Sequence[TextColumn]) -> list[str]:
    """What a narrow table says below it; empty where nothing is left out."""
    if not columns:
        return []
    names = ", ".join(column.title for column in columns)
    shown = "shows it" if len(columns) == 1 else "shows them"
    return [f"no room for {names}; a wider terminal or the report {shown}"]


def explain_empty_cells(records: Sequence[Record], num_metrics: int) -> list[str]:
    """Why finished jobs lack a metric that others have, a line for each reason.

    Args:
        records: of the jobs. Of one that is not finished the state says why.
        num_metrics: how many columns of metrics are shown.
    """
    numbers_by_reason: dict[str, dict[int, None]] = {}
    for metric in list_shared_metrics(records)[:num_metrics]:
        for record in records:
            if record.state == FINISHED and get_number(record, metric) is None:
                reason = explain_missing(record, metric)
                numbers_by_reason.setdefault(reason, {})[record.number] = None
    lines = []
    for reason, numbers in numbers_by_reason.items():
        jobs = "job" if len(numbers) == 1 else "jobs"
        lines.append(f"{MISSING} in {jobs} {', '.join(map(str, numbers))}: {reason}")
    return lines


def list_shared_metrics(records: Sequence[Record]) -> list[str]:
    """The metrics of the table that a job has."""
    shared = []
    for metric in SWEEP_METRICS:
        if any(get_number(record, metric) is not None for record in records):
            shared.append(metric)
    return shared


def measure_columns(columns: Sequence[TextColumn]) -> int:
    """The width of a table of these columns."""
    return sum(column.width for column in columns) + COLUMN_GAP * max(0, len(columns) - 1)


def build_text_table(columns: Sequence[TextColumn], caption: str) -> Table:
    """A table of columns that have the width they need."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left")
    table.caption = caption or None
    for column in columns:
        header = Text(column.title)
        if column.is_number:
            table.add_column(header, style=column.style, justify="right", min_width=column.width)
        else:
            table.add_column(header, style=column.style, width=column.width)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(make_plain, cells))
    return table


def count_warnings(records: Sequence[Record]) -> list[str]:
    """Each warning of some jobs once, with the number of jobs that gave it."""
    counts = Counter(warning for record in records for warning in dict.fromkeys(record.warnings))
    if len(records) == 1:
        return list(counts)
    return [f"{warning} ({count} of {len(records)} jobs)" for warning, count in counts.items()]
