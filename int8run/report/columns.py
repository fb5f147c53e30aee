"""The metrics that a report compares runs by: how each is headed, explained and written as a number.

Used by the table of runs, the recommendation, the plots and the gallery. Knows nothing of runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from int8run.metrics.names import DTYPE_FLOOR, NOISE_FLOOR, STEPS_SKIPPED_SHARE

STEP_MS = "speed/step_ms_p50"
SPEED_RATIO = "speed/ratio_vs_float"
PSNR_DB = "quality/psnr_db"
# Linears of the float model that are quantized numbers of the file which is compared with it
SAME_FILE_LAYERS = "quality/float_layers_from_same_file"
# of a PSNR to such a model: what it says nothing about
SAME_FILE_LIMITS = "shows neither what the file lost when it was made, nor that it is read as it was written"
CACHE_PSNR_DB = "cache/psnr_to_int8_db"
INT8_PSNR_DB = "cache/int8_psnr_db"
DENOISER_BYTES = "memory/denoiser_bytes"
DENOISER_RATIO = "memory/denoiser_ratio"
LATENT_ERROR = "quality/latent_rel_err"
VAE_PSNR_DB = "vae/psnr_db"
VAE_DECODE_RATIO = "vae/decode_ratio"
ATTENTION_SQNR_DB = "quant/attention_sqnr_db_mean"
MACS_INT8_SHARE = "quant/macs_int8_share"

MISSING = "–"
MAX_DECIMALS = 6
MAX_LOPSIDED = 0.2  # distance of a value from the middle of its interval, in half widths, that ± still says


@dataclass(frozen=True)
class MetricColumn:
    """How a metric is shown.

    Args:
        metric: its name in metrics.json.
        heading: the head of its column; a line break stays one on the page.
        description: what it measures, shown when the pointer rests on the heading.
        direction: 1 where more is better, -1 where less is better, 0 where neither is.
        decimals: digits after the point; None: three significant digits for the column's smallest value.
        scale: the shown number is the metric times this.
        suffix: follows the number.
        ceiling: a shown number below it is never rounded up to it.
        needs_difference: whether there is a column only where the values of two runs differ.
    """

    metric: str
    heading: str
    description: str
    direction: int
    decimals: int | None = None
    scale: float = 1.0
    suffix: str = ""
    ceiling: float = math.inf
    needs_difference: bool = False

    def is_needed_for(self, values: Sequence[float | None]) -> bool:
        """Whether a table of runs with these values has the column; None where a run has no value."""
        known = {value for value in values if value is not None}
        if self.needs_difference:
            return len(known) > 1
        return bool(known)

    def choose_decimals(self, values: Sequence[float]) -> int:
        """How many decimals a column with these values needs."""
        if self.decimals is not None:
            return self.decimals

        sizes = [abs(value * self.scale) for value in values if value and math.isfinite(value)]
        smallest = min(sizes, default=1.0)
        decimals = 2 - math.floor(math.log10(smallest))
        return min(MAX_DECIMALS, max(0, decimals))

    def format(self, value: float | None, decimals: int) -> str:
        """The value as text: `54.10`, `<0.01`, `>0.9999`, `equal`, or a dash where it is missing."""
        if value is None:
            return MISSING
        if math.isinf(value):
            # The ratio to a difference of zero.
            return "equal" if value > 0 else "−∞"

        shown = value * self.scale
        smallest_step = 10.0**-decimals
        is_rounded_to_zero = 0 < shown < smallest_step / 2
        if is_rounded_to_zero:
            return f"<{smallest_step:.{decimals}f}{self.suffix}"
        is_rounded_to_ceiling = shown < self.ceiling <= round(shown, decimals)
        if is_rounded_to_ceiling:
            return f">{self.ceiling - smallest_step:.{decimals}f}{self.suffix}"
        return f"{shown:.{decimals}f}{self.suffix}"

    def format_spread(self, value: float | None, low: float | None, high: float | None, decimals: int) -> str:
        """The interval of a value as text: `±0.6`, or `[1.57, 6.86]` where the value is far from its middle.

        Args:
            value: around which it lies.
            low: lower limit of the interval; None: there is none, and the text is empty.
            high: upper limit.
            decimals: of the value.
        """
        if value is None or low is None or high is None or not math.isfinite(high - low):
            return ""
        half_width = self.scale * (high - low) / 2
        distance = self.scale * abs(value - (low + high) / 2)
        smallest_step = 10.0**-decimals
        is_lopsided = distance > MAX_LOPSIDED * half_width
        if is_lopsided and distance > smallest_step / 2:
            return f"[{self.scale * low:.{decimals}f}, {self.scale * high:.{decimals}f}]"
        if 0 < half_width < smallest_step / 2:
            return f"±<{smallest_step:.{decimals}f}"
        return f"±{half_width:.{decimals}f}"


METRIC_COLUMNS = (
    MetricColumn(STEP_MS, "step\nms", "median time of a denoising step", direction=-1),
    MetricColumn(
        SPEED_RATIO,
        "speed\n× float",
        "the float model's step time divided by this one",
        direction=1,
        decimals=2,
        suffix="×",
    ),
    MetricColumn(
        STEPS_SKIPPED_SHARE,
        "steps\nskipped, %",
        "share of the denoising steps in which the step cache reused something",
        direction=1,
        decimals=0,
        scale=100,
    ),
    MetricColumn(
        CACHE_PSNR_DB,
        "cache\nPSNR, dB",
        "peak signal-to-noise ratio of the INT8 model with its step cache to it without: the cache's part",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        INT8_PSNR_DB,
        "INT8\nPSNR, dB",
        "peak signal-to-noise ratio of the INT8 model without its step cache to float: INT8's part",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        "steps/float",
        "float\nsteps",
        "steps of an image that the float denoiser computes, as int8.steps asks",
        direction=0,
    ),
    MetricColumn(
        "speed/images_per_s",
        "images\nper s",
        "images or videos per second, text encoding and decoding included",
        direction=1,
    ),
    MetricColumn(
        "speed/frames_per_s",
        "frames\nper s",
        "video frames per second, text encoding and decoding included",
        direction=1,
    ),
    MetricColumn(
        "energy/joules_per_image",
        "energy, J\nper image",
        "joules for an image or a video, of the CPU packages or of the GPU",
        direction=-1,
    ),
    MetricColumn(
        DENOISER_BYTES,
        "denoiser\nMB",
        "memory of the denoiser's weights, in 10⁶ bytes",
        direction=-1,
        scale=1e-6,
    ),
    MetricColumn(
        DENOISER_RATIO,
        "denoiser\nsmaller",
        "the float denoiser's memory divided by this one",
        direction=1,
        decimals=2,
        suffix="×",
    ),
    MetricColumn(
        "memory/text_encoder_ratio",
        "encoders\nsmaller",
        "the float text encoders' memory divided by these",
        direction=1,
        decimals=2,
        suffix="×",
    ),
    MetricColumn(
        PSNR_DB,
        "PSNR\ndB",
        "peak signal-to-noise ratio to the float model's images; identical images have no noise",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        NOISE_FLOOR,
        "float to\nitself, dB",
        "PSNR of the float model to itself, with another batch, attention kernel and number of threads",
        direction=0,
        decimals=1,
    ),
    MetricColumn(
        DTYPE_FLOOR,
        "float, other\ndtype, dB",
        "PSNR of the float model in another dtype to itself",
        direction=0,
        decimals=1,
    ),
    MetricColumn(
        "quality/ssim",
        "SSIM",
        "structural similarity to the float model's images, 1 at most",
        direction=1,
        decimals=4,
        ceiling=1.0,
    ),
    MetricColumn(
        "quality/ms_ssim",
        "MS-SSIM",
        "structural similarity at several scales, 1 at most",
        direction=1,
        decimals=4,
        ceiling=1.0,
    ),
    MetricColumn(
        "quality/lpips",
        "LPIPS",
        "perceptual distance to the float model's images",
        direction=-1,
        decimals=4,
    ),
    MetricColumn(
        "quality/effnet_distance",
        "EffNet\ndistance",
        "distance of EfficientNet features to those of the float model's images",
        direction=-1,
        decimals=5,
    ),
    MetricColumn(
        "quality/clip_score",
        "CLIP\nscore",
        "how well images match their prompts",
        direction=1,
        decimals=2,
    ),
    MetricColumn(
        LATENT_ERROR,
        "latent\nerror, %",
        "relative error of the final latents to the float model's",
        direction=-1,
        decimals=2,
        scale=100,
    ),
    MetricColumn(
        "quality/masked_psnr_db",
        "PSNR in\nmask, dB",
        "PSNR to the float model's edit inside the mask: where the edit may change its input, or does so",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        "quality/unmasked_psnr_db",
        "PSNR out of\nmask, dB",
        "PSNR to the float model's edit outside the mask: where the edit keeps its input",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        "quality/flicker_err",
        "flicker\nerror, %",
        "error of the differences between neighbouring frames, of the range of colors",
        direction=-1,
        decimals=2,
        scale=100,
    ),
    MetricColumn(
        "quality/drift",
        "drift\n%",
        "how far frames are from the image that the video begins with, of the range of colors",
        direction=0,
        decimals=2,
        scale=100,
    ),
    MetricColumn(
        "clip/cosine_mean",
        "embedding\ncosine",
        "cosine similarity of the prompt embeddings to the float text encoders'",
        direction=1,
        decimals=5,
        ceiling=1.0,
    ),
    MetricColumn(
        "quant/output_sqnr_db_min",
        "layer SQNR\nmin, dB",
        "signal-to-quantization-noise ratio of the worst INT8 layer's output",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        ATTENTION_SQNR_DB,
        "attention\nSQNR, dB",
        "signal-to-quantization-noise ratio of the INT8 attentions' outputs, mean over modules",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        MACS_INT8_SHARE,
        "multiply-adds\nINT8, %",
        "share of the denoiser's multiply-adds that are INT8",
        direction=1,
        decimals=1,
        scale=100,
        ceiling=100.0,
        needs_difference=True,  # every INT8 model has one
    ),
    MetricColumn(
        VAE_PSNR_DB,
        "VAE PSNR\ndB",
        "peak signal-to-noise ratio of what the INT8 VAE decodes to the same by the float VAE",
        direction=1,
        decimals=1,
    ),
    MetricColumn(
        VAE_DECODE_RATIO,
        "VAE\n× float",
        "the float VAE's time to decode divided by the INT8 one's",
        direction=1,
        decimals=2,
        suffix="×",
    ),
)


def find_column(metric: str) -> MetricColumn:
    """How a metric of METRIC_COLUMNS is shown."""
    return next(column for column in METRIC_COLUMNS if column.metric == metric)


PSNR_WITH_UNIT = MetricColumn(PSNR_DB, "PSNR", "", direction=1, decimals=1, suffix=" dB")


def format_psnr(value: float | None) -> str:
    """A PSNR with its unit: `41.5 dB`, `equal` for identical images, empty where it is missing."""
    return "" if value is None else PSNR_WITH_UNIT.format(value, decimals=1)
