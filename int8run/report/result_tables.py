"""The tables that end a command: the result of one run beside the float model, and the jobs of a sweep.

Builds rich tables from metrics and records; printing is the caller's.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box, get_console
from rich.markup import escape
from rich.table import Table

from int8run.report.formatting import format_decibels, format_megabytes
from int8run.tracking.run_record import FINISHED, Record, split_override

UNLIMITED_WIDTH = 10_000  # characters

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
        float_value = self.metrics.get(f"float/{metric.rpartition('/')[2]}")
        float_text = "–" if float_value is None else form(float_value)
        ratio_text = f"{ratio(float_value, value):.2f}×" if ratio and float_value and value else ""
        self.table.add_row(label, float_text, form(value), ratio_text)

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


@dataclass(frozen=True)
class SweepColumn:
    """One metric of every job.

    Args:
        title: heads the column.
        metric: which one.
        form: how it is shown.
    """

    title: str
    metric: str
    form: Format


def format_psnr_number(value: float) -> str:
    """A PSNR without its unit."""
    return "equal" if math.isinf(value) else f"{value:.1f}"


# The most important first: a narrow terminal has room for some of them.
SWEEP_COLUMNS = (
    SweepColumn("PSNR dB", "quality/psnr_db", format_psnr_number),
    SweepColumn("× float", "speed/ratio_vs_float", "{:.2f}".format),
    SweepColumn("step ms", "speed/step_ms_p50", "{:.1f}".format),
    SweepColumn("MB", "memory/denoiser_bytes", lambda nbytes: f"{nbytes / 1e6:.1f}"),
    SweepColumn("latent err %", "quality/latent_rel_err", lambda share: f"{100 * share:.2f}"),
)


def build_sweep_table(records: Sequence[Record], varying: Sequence[str]) -> Table:
    """The jobs of a sweep, a line each, with as many metrics as the terminal has room for.

    Args:
        records: of the jobs.
        varying: the settings that differ between them, by their names on the command line.
    """
    columns = [column for column in SWEEP_COLUMNS if any(column.metric in r.metrics for r in records)]
    console = get_console()
    unlimited = console.options.update(width=UNLIMITED_WIDTH)
    for num_columns in range(len(columns), 0, -1):
        table = build_sweep_rows(records, varying, columns[:num_columns])
        if console.measure(table, options=unlimited).maximum <= console.width:
            return table
    return build_sweep_rows(records, varying, columns[:1])


def build_sweep_rows(
    records: Sequence[Record], varying: Sequence[str], columns: Sequence[SweepColumn]
) -> Table:
    """A line per job: its number, its settings, some metrics, and its state where not all are finished.

    Args:
        records: of the jobs.
        varying: the settings to show.
        columns: the metrics to show.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("job", justify="right")
    for key in varying:
        table.add_column(key.rpartition(".")[2], style="bold", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    all_finished = all(record.state == FINISHED for record in records)
    if not all_finished:
        table.add_column("", style="red")

    for record in records:
        settings = dict(map(split_override, record.overrides))
        cells = [str(record.number)]
        cells += [escape(settings.get(key, "")) for key in varying]
        cells += [format_cell(record, column) for column in columns]
        if not all_finished:
            cells.append("" if record.state == FINISHED else record.state)
        table.add_row(*cells)
    return table


def format_cell(record: Record, column: SweepColumn) -> str:
    """One metric of one job; a dash where it is missing."""
    if column.metric not in record.metrics:
        return "–"
    return column.form(record.metrics[column.metric])


def count_warnings(records: Sequence[Record]) -> list[str]:
    """Each warning of some jobs once, with the number of jobs that gave it."""
    counts = Counter(warning for record in records for warning in dict.fromkeys(record.warnings))
    if len(records) == 1:
        return list(counts)
    return [f"{warning} ({count} of {len(records)} jobs)" for warning, count in counts.items()]
