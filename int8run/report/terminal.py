"""What a run shows: bars while it works, one table at the end. Bars only on a terminal."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import get_console
from rich import progress as bars
from rich.markup import escape
from rich.table import Table

log = logging.getLogger(__name__)


class Progress:
    """Named steps and counted loops: a bar on a terminal, one log line each elsewhere."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.shown = enabled and get_console().is_terminal

    @contextmanager
    def count(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A loop of known length; the yielded function advances it."""
        if not self.shown:
            if self.enabled:
                log.info("%s (%d)", name, total)
            yield lambda count: None
            return
        columns = (bars.TextColumn("{task.description:>18}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
        with bars.Progress(*columns, console=get_console(), transient=False) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.advance(task, count)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of unknown length."""
        if not self.shown:
            if self.enabled:
                log.info("%s", name)
            yield
            return
        columns = (bars.TextColumn("{task.description:>18}"), bars.SpinnerColumn(finished_text="✓"), bars.TimeElapsedColumn())
        with bars.Progress(*columns, console=get_console(), transient=False) as bar:
            task = bar.add_task(name, total=1)
            yield
            bar.advance(task)


def result_table(title: str, metrics: Mapping[str, float], ours: str) -> Table:
    """Float beside `ours` with the ratio, then what the difference costs."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column, style in (("", "bold"), ("float", ""), (ours, ""), ("ratio", "green")):
        table.add_column(column, style=style, justify="left" if not column else "right")

    def row(name: str, base: str, ours_name: str, fmt: Callable[[float], str], ratio: Callable[[float, float], float] | None) -> None:
        a, b = metrics.get(base), metrics.get(ours_name)
        if b is None:
            return
        shown = f"{ratio(a, b):.2f}×" if ratio and a and b else ""
        table.add_row(name, "–" if a is None else fmt(a), fmt(b), shown)

    faster, more = (lambda a, b: a / b), (lambda a, b: b / a)
    row("step, median", "float/step_ms_p50", "speed/step_ms_p50", lambda v: f"{v:.1f} ms", faster)
    row("step, 90 %", "float/step_ms_p90", "speed/step_ms_p90", lambda v: f"{v:.1f} ms", faster)
    video = "speed/frames_per_s" in metrics
    row(f"{'videos' if video else 'images'} per second", "float/images_per_s", "speed/images_per_s", lambda v: f"{v:.2f}", more)
    row("frames per second", "float/frames_per_s", "speed/frames_per_s", lambda v: f"{v:.2f}", more)
    row("denoiser memory", "float/denoiser_bytes", "memory/denoiser_bytes", megabytes, faster)
    if "memory/text_encoder_ratio" in metrics:
        row("text encoder memory", "float/text_encoder_bytes", "memory/text_encoder_bytes", megabytes, faster)
    if "clip/cosine_mean" in metrics:
        table.add_section()
        table.add_row("embedding cosine, mean / min", "", f"{metrics['clip/cosine_mean']:.5f} / {metrics['clip/cosine_min']:.5f}", "")
        table.add_row("embedding error", "", f"{100 * metrics['clip/rel_err']:.2f} %", "")
    if "quality/psnr_db" in metrics:
        table.add_section()
        table.add_row("PSNR to float", "", decibel(metrics["quality/psnr_db"]), "")
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
        table.add_row("Linears kept / INT8", "", f"{metrics['quant/layers_float']:.0f} / {metrics['quant/layers_int8']:.0f}", "")
        if metrics["quant/fallback_layers"]:
            table.add_row("of these in float, few rows", "", f"{metrics['quant/fallback_layers']:.0f}", "")
        if "quant/output_sqnr_db_mean" in metrics:
            values = f"{metrics['quant/output_sqnr_db_mean']:.1f} / {metrics['quant/output_sqnr_db_min']:.1f} dB"
            table.add_row("layer SQNR, mean / min", "", values, "")
    if "lora/modules_matched" in metrics:
        table.add_row("LoRA modules matched", "", f"{metrics['lora/modules_matched']:.0f}", "")
    if "lora/overhead_ratio" in metrics:
        table.add_row("LoRA branch, step time", "", f"{metrics['lora/overhead_ratio']:.2f}×", "")
    return table


def megabytes(count: float) -> str:
    """Bytes for a person, in MB of 10^6."""
    return f"{count / 1e6:.1f} MB"


def decibel(value: float) -> str:
    """A ratio for a person; equal pictures have no noise to compare with."""
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def say(*lines: object) -> None:
    """Print to the terminal that the bars are on."""
    for line in lines:
        get_console().print(line, highlight=False, soft_wrap=True)


def pairs_line(facts: Sequence[tuple[str, object]]) -> str:
    """`model tiny · backend auto · …` for the first line of a run."""
    return " · ".join(f"{name} [bold]{escape(str(value))}[/bold]" for name, value in facts)
