"""What a run shows: bars while it works, one table at the end. Bars only on a terminal."""

import logging
import math
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box, get_console
from rich import progress as bars
from rich.markup import escape
from rich.table import Table

from int8run.tracking.run_record import FINISHED, Record, split_override

log = logging.getLogger(__name__)
ERROR_WIDTH = 100  # of a job's error while the sweep goes on; its last line has it whole
SMALLER_IS_BETTER = (
    "_err",
    "_ms",
    "_s",
    "_ms_p50",
    "_ms_p90",
    "_bytes",
    "lpips",
    "_distance",
    "_share",
    "overhead_ratio",
    "fallback_layers",
)


class Progress:
    """Named steps and counted loops: a bar on a terminal, one log line each elsewhere.

    Args:
        transient: the bars go when they are done, as in a sweep, where a line for each job stays.
    """

    def __init__(self, enabled: bool, transient: bool = False):
        self.enabled, self.transient = enabled, transient
        self.is_shown = enabled and get_console().is_terminal

    @contextmanager
    def track_loop(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A loop of known length; the yielded function advances it."""
        if not self.is_shown:
            if self.enabled:
                log.info("%s (%d)", name, total)
            yield lambda count: None
            return
        columns = (
            bars.TextColumn("{task.description:>18}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
        )
        with bars.Progress(*columns, console=get_console(), transient=self.transient) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.advance(task, count)

    @contextmanager
    def track_step(self, name: str) -> Iterator[None]:
        """A step of unknown length."""
        if not self.is_shown:
            if self.enabled:
                log.info("%s", name)
            yield
            return
        columns = (
            bars.TextColumn("{task.description:>18}"),
            bars.SpinnerColumn(finished_text="✓"),
            bars.TimeElapsedColumn(),
        )
        with bars.Progress(*columns, console=get_console(), transient=self.transient) as bar:
            task = bar.add_task(name, total=1)
            yield
            bar.advance(task)


class SweepProgress:
    """A line for every job of a sweep: which of how many, how long it took and what is left, what is best so far."""

    def __init__(self, total: int, finished: int, objective: str, enabled: bool):
        self.total, self.finished, self.objective, self.enabled = total, finished, objective, enabled
        self.began = time.monotonic()
        self.ran = 0  # in this process and its workers
        self.best: Record | None = None

    def report_start(self, number: int, name: str) -> None:
        """On a terminal, before the job's own bars."""
        if self.enabled and get_console().is_terminal:
            print_lines(f"[bold]job {number}[/bold] {escape(name)} …")

    def report_end(self, record: Record) -> None:
        """What a job came to, and what is left."""
        self.ran += 1
        self.finished += 1
        self.best = choose_better(self.best, record, self.objective)
        if not self.enabled:
            return
        gone = time.monotonic() - self.began
        left = gone / self.ran * (self.total - self.finished)
        words = [
            f"job {record.number} ({record.name}) {describe_outcome(record)}",
            f"{self.finished} of {self.total}, {format_duration(gone)} gone",
        ]
        if self.finished < self.total:
            words.append(f"about {format_duration(left)} left")
        if self.best is not None and self.finished > 1:
            words.append(
                f"best {self.objective} {format_metric(self.best, self.objective)}: {self.best.label}"
            )
        if get_console().is_terminal:
            print_lines(escape(" · ".join(words)))
        else:
            log.log(logging.INFO if record.state == FINISHED else logging.ERROR, "%s", " · ".join(words))


def describe_outcome(record: Record) -> str:
    """How a job ended, in its most telling numbers."""
    if record.state != FINISHED:
        return textwrap.shorten(f"{record.state}: {record.error}", ERROR_WIDTH, placeholder=" …")
    said = {
        "quality/psnr_db": lambda v: f"PSNR {format_decibels(v)}",
        "speed/ratio_vs_float": lambda v: f"{v:.2f}× float's speed",
        "speed/step_ms_p50": lambda v: f"{v:.1f} ms a step",
    }
    return (
        ", ".join(words(record.metrics[name]) for name, words in said.items() if name in record.metrics)
        or "finished"
    )


def format_metric(record: Record, name: str) -> str:
    """One metric for a person."""
    value = record.metrics[name]
    return format_decibels(value) if name.endswith("_db") else f"{value:.4g}"


def choose_better(best: Record | None, record: Record, objective: str) -> Record | None:
    """The better of two jobs; errors, times and sizes are better when they are smaller."""
    value = record.metrics.get(objective) if record.state == FINISHED else None
    if value is None or math.isnan(value):
        return best
    if best is None:
        return record
    held = best.metrics[objective]
    return record if (value < held if is_smaller_better(objective) else value > held) else best


def is_smaller_better(metric: str) -> bool:
    """Whether a metric counts something that one has too much of."""
    return metric.endswith(SMALLER_IS_BETTER)


def format_duration(seconds: float) -> str:
    """`1:05:09` or `0:42`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def build_sweep_table(records: Sequence[Record], varying: Sequence[str]) -> Table:
    """The jobs of a sweep beside each other, one line each, with as many numbers as the terminal has room for."""
    shown = [column for column in SWEEP_COLUMNS if any(column.metric in r.metrics for r in records)]
    tables = [build_sweep_rows(records, varying, shown[:count]) for count in range(len(shown), 0, -1)] or [
        build_sweep_rows(records, varying, [])
    ]
    console = get_console()
    endless = console.options.update(width=10_000)
    return next(
        (table for table in tables if console.measure(table, options=endless).maximum <= console.width),
        tables[-1],
    )


def build_sweep_rows(
    records: Sequence[Record], varying: Sequence[str], shown: Sequence["SweepColumn"]
) -> Table:
    """A line per job: its number, its settings, some numbers, and the state where not all are finished."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("job", justify="right")
    for key in varying:
        table.add_column(key.rpartition(".")[2], style="bold", no_wrap=True)
    for column in shown:
        table.add_column(column.title, justify="right", no_wrap=True)
    ended = all(record.state == FINISHED for record in records)
    if not ended:
        table.add_column("", style="red")
    for record in records:
        words = dict(map(split_override, record.overrides))
        cells = [
            column.form(record.metrics[column.metric]) if column.metric in record.metrics else "–"
            for column in shown
        ]
        state = [] if ended else ["" if record.state == FINISHED else record.state]
        table.add_row(str(record.number), *(escape(words.get(key, "")) for key in varying), *cells, *state)
    return table


def count_warnings(records: Sequence[Record]) -> list[str]:
    """Each warning of some jobs once, with the number of jobs that had it."""
    counts = Counter(line for record in records for line in dict.fromkeys(record.warnings))
    return [
        f"{line}" + (f" ({count} of {len(records)} jobs)" if len(records) > 1 else "")
        for line, count in counts.items()
    ]


def build_result_table(title: str, metrics: Mapping[str, float], ours: str) -> Table:
    """Float beside `ours` with the ratio, then what the difference costs."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column, style in (("", "bold"), ("float", ""), (ours, ""), ("ratio", "green")):
        table.add_column(column, style=style, justify="left" if not column else "right")

    def row(
        name: str,
        base: str,
        ours_name: str,
        fmt: Callable[[float], str],
        ratio: Callable[[float, float], float] | None,
    ) -> None:
        a, b = metrics.get(base), metrics.get(ours_name)
        if b is None:
            return
        shown = f"{ratio(a, b):.2f}×" if ratio and a and b else ""
        table.add_row(name, "–" if a is None else fmt(a), fmt(b), shown)

    faster, more = (lambda a, b: a / b), (lambda a, b: b / a)
    row("step, median", "float/step_ms_p50", "speed/step_ms_p50", lambda v: f"{v:.1f} ms", faster)
    row("step, 90 %", "float/step_ms_p90", "speed/step_ms_p90", lambda v: f"{v:.1f} ms", faster)
    video = "speed/frames_per_s" in metrics
    row(
        f"{'videos' if video else 'images'} per second",
        "float/images_per_s",
        "speed/images_per_s",
        lambda v: f"{v:.2f}",
        more,
    )
    row("frames per second", "float/frames_per_s", "speed/frames_per_s", lambda v: f"{v:.2f}", more)
    row("denoiser memory", "float/denoiser_bytes", "memory/denoiser_bytes", format_megabytes, faster)
    if "memory/text_encoder_ratio" in metrics:
        row(
            "text encoder memory",
            "float/text_encoder_bytes",
            "memory/text_encoder_bytes",
            format_megabytes,
            faster,
        )
    if "clip/cosine_mean" in metrics:
        table.add_section()
        table.add_row(
            "embedding cosine, mean / min",
            "",
            f"{metrics['clip/cosine_mean']:.5f} / {metrics['clip/cosine_min']:.5f}",
            "",
        )
        table.add_row("embedding error", "", f"{100 * metrics['clip/rel_err']:.2f} %", "")
    if "quality/psnr_db" in metrics:
        table.add_section()
        table.add_row("PSNR to float", "", format_decibels(metrics["quality/psnr_db"]), "")
        table.add_row("SSIM to float", "", f"{metrics['quality/ssim']:.4f}", "")
        if "quality/ms_ssim" in metrics:
            table.add_row("MS-SSIM to float", "", f"{metrics['quality/ms_ssim']:.4f}", "")
        if "quality/lpips" in metrics:
            table.add_row("LPIPS to float", "", f"{metrics['quality/lpips']:.4f}", "")
        if "quality/effnet_distance" in metrics:
            table.add_row("EfficientNet distance", "", f"{metrics['quality/effnet_distance']:.5f}", "")
        row("CLIP score", "float/clip_score", "quality/clip_score", lambda v: f"{v:.2f}", None)
        table.add_row("latent error", "", f"{100 * metrics['quality/latent_rel_err']:.2f} %", "")
        if metrics.get("quality/half_error_step"):
            table.add_row("half of it by step", "", f"{metrics['quality/half_error_step']:.0f}", "")
    if "quant/layers_int8" in metrics:
        table.add_section()
        table.add_row(
            "Linears kept / INT8",
            "",
            f"{metrics['quant/layers_float']:.0f} / {metrics['quant/layers_int8']:.0f}",
            "",
        )
        if metrics["quant/fallback_layers"]:
            table.add_row("of these in float, few rows", "", f"{metrics['quant/fallback_layers']:.0f}", "")
        if "quant/output_sqnr_db_mean" in metrics:
            values = (
                f"{metrics['quant/output_sqnr_db_mean']:.1f} / {metrics['quant/output_sqnr_db_min']:.1f} dB"
            )
            table.add_row("layer SQNR, mean / min", "", values, "")
    if "lora/modules_matched" in metrics:
        table.add_row("LoRA modules matched", "", f"{metrics['lora/modules_matched']:.0f}", "")
    if "lora/overhead_ratio" in metrics:
        table.add_row("LoRA branch, step time", "", f"{metrics['lora/overhead_ratio']:.2f}×", "")
    return table


def format_megabytes(count: float) -> str:
    """Bytes for a person, in MB of 10^6."""
    return f"{count / 1e6:.1f} MB"


def format_decibels(value: float) -> str:
    """A ratio for a person; equal pictures have no noise to compare with."""
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def print_lines(*lines: object) -> None:
    """Print to the terminal that the bars are on."""
    for line in lines:
        get_console().print(line, highlight=False, soft_wrap=True)


def format_pairs(facts: Sequence[tuple[str, object]]) -> str:
    """`model tiny · backend auto · …` for the first line of a run."""
    return " · ".join(f"{name} [bold]{escape(str(value))}[/bold]" for name, value in facts)


@dataclass(frozen=True)
class SweepColumn:
    """One number of every job."""

    title: str
    metric: str
    form: Callable[[float], str]


SWEEP_COLUMNS = (  # those that matter most first
    SweepColumn("PSNR dB", "quality/psnr_db", lambda v: "equal" if math.isinf(v) else f"{v:.1f}"),
    SweepColumn("× float", "speed/ratio_vs_float", "{:.2f}".format),
    SweepColumn("step ms", "speed/step_ms_p50", "{:.1f}".format),
    SweepColumn("MB", "memory/denoiser_bytes", lambda v: f"{v / 1e6:.1f}"),
    SweepColumn("latent err %", "quality/latent_rel_err", lambda v: f"{100 * v:.2f}"),
)
