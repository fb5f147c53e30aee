"""The table that ends a run: what it measured, beside the float model.

Builds a rich table from metrics; printing is the caller's. `sweep_table` has that of a sweep.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from int8run.layers.step_precision import STEP_PRECISIONS, describe_step_counts
from int8run.metrics.names import (
    DTYPE_FLOOR,
    HIGH,
    INDEPENDENT,
    LOW,
    MEASURED,
    NOISE_FLOOR,
    SAMPLES,
    STEPS_SKIPPED_SHARE,
)
from int8run.report.columns import (
    MISSING,
    SAME_FILE_LAYERS,
    SAME_FILE_LIMITS,
    SPEED_RATIO,
    STEP_MS,
)
from int8run.report.formatting import describe_identical, format_decibels, format_megabytes

SAME_FILE_NOTE = f"float has numbers of the same quantized file: PSNR to it {SAME_FILE_LIMITS}"

# metrics of `metrics.perceptual` with rows that are written out below
OWN_ROWS = ("quality/ms_ssim", "quality/lpips", "quality/effnet_distance", "quality/clip_score")
DEFAULT_LEVEL = 0.95  # of intervals
UNIT = re.compile(r"[^0-9]+$")  # behind a number

Format = Callable[[float], str]
Ratio = Callable[[float, float], float]


def build_result_table(
    title: str,
    metrics: Mapping[str, float],
    candidate: str,
    *,
    has_both_models: bool = True,
    best_float: str = "",
    num_steps: int = 0,
    statistics: Mapping[str, Any] | None = None,
) -> Table:
    """The float model beside the candidate with their ratio, then quality and layers.

    What was not measured has no row.

    Args:
        title: of the table.
        metrics: of the run.
        candidate: head of the candidate's column, such as `INT8`.
        has_both_models: whether both were in memory at once, which the peak memory of each includes.
        best_float: the fastest float dtype of this machine, where it is known.
        num_steps: whose latents were compared.
        statistics: that part of metrics.json, with the level of the intervals; None: not known.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("", style="bold")
    table.add_column("float", justify="right")
    table.add_column(candidate, justify="right")
    table.add_column("ratio", style="green", justify="right")

    found = statistics or {}
    rows = ResultRows(table, metrics, has_both_models, best_float, num_steps, found.get("metrics", {}))
    rows.add_speed_and_memory()
    rows.add_embeddings()
    rows.add_quality()
    rows.add_layers()
    rows.add_controlnets()
    rows.add_vae()
    rows.add_loras()
    rows.explain_intervals(found.get("level", DEFAULT_LEVEL))
    return table


@dataclass(frozen=True)
class ResultRows:
    """Adds the rows of a result table, section by section."""

    table: Table
    metrics: Mapping[str, float]
    has_both_models: bool
    best_float: str
    num_steps: int
    statistics: Mapping[str, Mapping[str, Any]]

    @property
    def step_counts(self) -> dict[str, float]:
        """How many steps of an image each precision computes; empty where INT8 computes all."""
        counts = {precision: self.metrics.get(f"steps/{precision}") for precision in STEP_PRECISIONS}
        return {precision: count for precision, count in counts.items() if count is not None}

    def add_speed_and_memory(self) -> None:
        """Times, rates and sizes, each with the float model's."""
        if STEPS_SKIPPED_SHARE in self.metrics:
            self.add_steps_with_cache()
        else:
            # where two denoisers share the steps, a median over all would be that of one of them
            label = "step, mean of medians" if self.step_counts else "step, median"
            self.add_comparison(label, STEP_MS, format_milliseconds, divide_float)
        self.add_comparison("step, 90 %", "speed/step_ms_p90", format_milliseconds, divide_float)
        self.add_best_float()
        self.add_step_counts()
        samples = "videos" if "speed/frames_per_s" in self.metrics else "images"
        self.add_comparison(f"{samples} per second", "speed/images_per_s", "{:.2f}".format, divide_by_float)
        self.add_comparison("frames per second", "speed/frames_per_s", "{:.2f}".format, divide_by_float)
        self.add_comparison("joules per image", "energy/joules_per_image", "{:.3g}".format, divide_float)
        self.add_comparison("denoiser memory", "memory/denoiser_bytes", format_megabytes, divide_float)
        self.add_peak_memory()
        if "memory/text_encoder_ratio" in self.metrics:
            self.add_comparison(
                "text encoder memory", "memory/text_encoder_bytes", format_megabytes, divide_float
            )

    def add_steps_with_cache(self) -> None:
        """The mean time of a step, which a cache changes in some steps alone, and what it is made of."""
        step_ms = self.metrics["cache/step_ms_mean"]
        ratio = self.metrics.get(SPEED_RATIO)
        float_text, ratio_text = MISSING, ""
        if ratio is not None:
            float_text = format_milliseconds(step_ms * ratio)
            ratio_text = f"{ratio:.2f}×" + self.format_interval(SPEED_RATIO, "{:.2f}".format)
        self.table.add_row("step, mean", float_text, format_milliseconds(step_ms), ratio_text)
        self.add_ratio("· INT8 alone", "cache/int8_ratio")
        self.add_ratio("· the cache alone", "cache/ratio_vs_int8")
        self.add_ratio("float + cache", "cache/float_ratio")
        skipped, computed = self.metrics["cache/steps_skipped"], self.metrics["cache/steps_computed"]
        self.add_row("steps skipped", f"{skipped:.0f} of {skipped + computed:.0f}")
        self.add_value("multiply-adds skipped", "cache/macs_skipped_share", format_share)

    def add_ratio(self, label: str, metric: str) -> None:
        """A row with a number in the column of ratios; no row where it is missing."""
        if metric in self.metrics:
            self.table.add_row(label, "", "", f"{self.metrics[metric]:.2f}×")

    def add_best_float(self) -> None:
        """How the candidate compares with the fastest float dtype, which need not be the model's."""
        ratio = self.metrics.get("speed/ratio_vs_best_float")
        if ratio is not None and self.best_float:
            self.table.add_row(f"step, fastest float: {self.best_float}", "", "", f"{ratio:.2f}×")

    def add_step_counts(self) -> None:
        """How many steps each of both denoisers computes, where they share them."""
        if self.step_counts:
            self.add_row("steps of an INT8 image", describe_step_counts(self.step_counts))

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
        self.add_value("· INT8 alone", "cache/int8_psnr_db", format_decibels)
        self.add_value("· the cache alone", "cache/psnr_to_int8_db", format_decibels)
        self.add_value("float + cache, PSNR", "cache/float_psnr_db", format_decibels)
        self.add_value("float to itself, PSNR", NOISE_FLOOR, format_decibels)
        self.add_value("float in another dtype, PSNR", DTYPE_FLOOR, format_decibels)
        if SAME_FILE_LAYERS in self.metrics:
            self.add_value("float layers of the same file", SAME_FILE_LAYERS, "{:.0f}".format)
            self.add_note(SAME_FILE_NOTE)
        self.add_value("SSIM to float", "quality/ssim", "{:.4f}".format)
        self.add_value("MS-SSIM to float", "quality/ms_ssim", "{:.4f}".format)
        self.add_value("LPIPS to float", "quality/lpips", "{:.4f}".format)
        self.add_value("EfficientNet distance", "quality/effnet_distance", "{:.5f}".format)
        self.add_comparison("CLIP score", "quality/clip_score", "{:.2f}".format, ratio=None)
        self.add_measured()
        self.add_value("latent error", "quality/latent_rel_err", format_percent)
        if self.metrics.get("quality/half_error_step"):
            form = f"{{:.0f}} of {self.num_steps}".format
            self.add_value("half of the error by step", "quality/half_error_step", form)
        self.add_edits()
        self.add_value("samples", SAMPLES, "{:.0f}".format)

    def add_measured(self) -> None:
        """The other metrics of `metrics.perceptual`, each with the float model's where it has a number."""
        for name, metric in MEASURED.items():
            is_asked = metric.measure is not None and name.startswith("quality/")
            if not is_asked or name in OWN_ROWS:
                continue
            label = ", ".join(filter(None, [metric.label, metric.unit]))
            if name.replace("quality/", "float/") in self.metrics:
                self.add_comparison(label, name, "{:.4g}".format, ratio=None)
            else:
                self.add_value(label, name, "{:.4g}".format)

    def add_edits(self) -> None:
        """What edits keep inside and outside a mask, and videos from frame to frame."""
        self.add_value("PSNR inside the mask", "quality/masked_psnr_db", format_decibels)
        self.add_value("PSNR outside the mask", "quality/unmasked_psnr_db", format_decibels)
        self.add_value("share inside the mask", "quality/masked_share", format_percent)
        self.add_value("error of frames", "quality/frame_err", format_percent)
        self.add_value("error of flicker", "quality/flicker_err", format_percent)
        self.add_comparison("drift from the first frame", "quality/drift", format_percent, ratio=None)

    def add_layers(self) -> None:
        """How many layers are INT8, and how exact they are."""
        if "quant/layers_int8" not in self.metrics:
            return
        num_float, num_int8 = self.metrics["quant/layers_float"], self.metrics["quant/layers_int8"]
        self.table.add_section()
        self.add_row("layers, float / INT8", f"{num_float:.0f} / {num_int8:.0f}")
        self.add_value("multiply-adds in INT8", "quant/macs_int8_share", format_share)
        self.add_count("layers of 4 bits", "quant/layers_4_bits")
        self.add_count("layers of 6 bits", "quant/layers_6_bits")
        self.add_count("layers without the bits asked for", "quant/layers_without_their_bits")
        self.add_count("float by choice", "quant/layers_float_by_choice")
        self.add_count("small-batch fallback", "quant/fallback_layers")
        self.add_count("layers with a backend left out", "quant/layers_with_backends_left_out")
        if "quant/output_sqnr_db_mean" in self.metrics:
            mean, least = self.metrics["quant/output_sqnr_db_mean"], self.metrics["quant/output_sqnr_db_min"]
            self.add_row("layer SQNR, mean / min", f"{mean:.1f} / {least:.1f} dB")
        self.add_attention()

    def add_attention(self) -> None:
        """How many attentions are INT8, and how exact they are; nothing where INT8 was not asked for."""
        if "quant/attention_int8" not in self.metrics:
            return
        num_float, num_int8 = self.metrics["quant/attention_float"], self.metrics["quant/attention_int8"]
        self.add_row("attentions, float / INT8", f"{num_float:.0f} / {num_int8:.0f}")
        if "quant/attention_sqnr_db_mean" in self.metrics:
            mean = self.metrics["quant/attention_sqnr_db_mean"]
            least = self.metrics["quant/attention_sqnr_db_min"]
            self.add_row("attention SQNR, mean / min", f"{mean:.1f} / {least:.1f} dB")

    def add_controlnets(self) -> None:
        """How many layers of the ControlNets are INT8, and what memory that saves."""
        if "controlnet/layers_int8" not in self.metrics:
            return
        num_float, num_int8 = self.metrics["controlnet/layers_float"], self.metrics["controlnet/layers_int8"]
        self.add_row("ControlNet layers, float / INT8", f"{num_float:.0f} / {num_int8:.0f}")
        num_bytes, ratio = self.metrics["memory/controlnet_bytes"], self.metrics["memory/controlnet_ratio"]
        float_size, size = format_megabytes(num_bytes * ratio), format_megabytes(num_bytes)
        self.table.add_row("ControlNet memory", float_size, size, f"{ratio:.2f}×")

    def add_vae(self) -> None:
        """What the INT8 VAE costs and brings, on the same latents as the float one."""
        self.add_value("VAE, PSNR to the float VAE", "vae/psnr_db", format_decibels)
        if "vae/decode_ratio" in self.metrics:
            milliseconds, ratio = self.metrics["vae/decode_ms"], self.metrics["vae/decode_ratio"]
            float_time, time = format_milliseconds(milliseconds * ratio), format_milliseconds(milliseconds)
            self.table.add_row("VAE, decoding", float_time, time, f"{ratio:.2f}×")
        if "vae/memory_ratio" in self.metrics:
            num_bytes, ratio = self.metrics["vae/memory_bytes"], self.metrics["vae/memory_ratio"]
            float_size, size = format_megabytes(num_bytes * ratio), format_megabytes(num_bytes)
            self.table.add_row("VAE memory", float_size, size, f"{ratio:.2f}×")

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
        if metric == STEP_MS:
            ratio_text += self.format_interval(SPEED_RATIO, "{:.2f}".format)
        self.table.add_row(label, form(float_value), form(value), ratio_text)

    def add_value(self, label: str, metric: str, form: Format) -> None:
        """A metric that only the candidate has, with its interval; no row where it is missing."""
        if metric not in self.metrics:
            return
        text = form(self.metrics[metric]) + self.format_interval(metric, form)
        identical = describe_identical(self.statistics.get(metric, {}))
        self.add_row(label, ", ".join(filter(None, [text, identical])))

    def format_interval(self, metric: str, form: Format) -> str:
        """The interval of a metric, without its unit: ` [54.3, 55.5]`; empty where it has none.

        Args:
            metric: that may have one.
            form: how its value is shown.
        """
        limits = [self.metrics.get(f"{metric}{LOW}"), self.metrics.get(f"{metric}{HIGH}")]
        numbers = [UNIT.sub("", form(limit)) for limit in limits if limit is not None]
        return f" [{', '.join(numbers)}]" if len(numbers) == len(limits) else ""

    def explain_intervals(self, level: float) -> None:
        """Say below the table what is in brackets, or why nothing is."""
        num_samples = self.metrics.get(SAMPLES)
        if num_samples is None:
            return
        if num_samples == 1:
            self.add_note("one sample: no intervals")
            return
        counted = f"{num_samples:.0f} samples"
        num_independent = self.metrics.get(INDEPENDENT)
        if num_independent is not None:
            counted += f" of {num_independent:.0f} prompts or inputs"
        self.add_note(f"[low, high]: {100 * level:g} % intervals of means over {counted}")

    def add_note(self, text: str) -> None:
        """A line below the table."""
        lines = [str(self.table.caption), text] if self.table.caption else [text]
        self.table.caption = "\n".join(lines)

    def add_count(self, label: str, metric: str) -> None:
        """A number of layers; no row where there are none."""
        if self.metrics.get(metric):
            self.add_value(label, metric, "{:.0f}".format)

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


def format_share(share: float) -> str:
    """A share in percent, with one decimal: `98.9 %`."""
    return f"{100 * share:.1f} %"


def format_percent(share: float) -> str:
    """A share in percent: `0.54 %`."""
    return f"{100 * share:.2f} %"
