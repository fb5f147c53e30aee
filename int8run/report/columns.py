"""The columns of the report's table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEP_MS, SPEED_RATIO, PSNR_DB = "speed/step_ms_p50", "speed/ratio_vs_float", "quality/psnr_db"


DENOISER_BYTES, DENOISER_RATIO = "memory/denoiser_bytes", "memory/denoiser_ratio"


MISSING = "–"


@dataclass(frozen=True)
class MetricColumn:
    """How a metric is shown.

    Args:
        better: 1 where more is better, -1 where less is, 0 where neither.
        decimals: None gives the smallest value of the column three digits.
        ceiling: a value below it is never rounded up to it.
    """

    metric: str
    heading: str
    description: str
    direction: int
    decimals: int | None = None
    scale: float = 1.0
    suffix: str = ""
    ceiling: float = math.inf

    def choose_decimals(self, values: Sequence[float]) -> int:
        """Decimals for a column of these values."""
        if self.decimals is not None:
            return self.decimals
        least = min((abs(v * self.scale) for v in values if v and math.isfinite(v)), default=1.0)
        return min(6, max(0, 2 - math.floor(math.log10(least))))

    def format(self, value: float | None, digits: int) -> str:
        """A number for a person."""
        if value is None:
            return MISSING
        if math.isinf(value):  # a ratio to a difference that is nothing
            return "equal" if value > 0 else "−∞"
        shown, least = value * self.scale, 10.0**-digits
        if 0 < shown < least / 2:
            return f"<{least:.{digits}f}{self.suffix}"
        if shown < self.ceiling <= round(shown, digits):
            return f">{self.ceiling - least:.{digits}f}{self.suffix}"
        return f"{shown:.{digits}f}{self.suffix}"


# a line break in a heading is one on the page
METRIC_COLUMNS = (
    MetricColumn(STEP_MS, "step\nms", "median time of a denoising step", -1),
    MetricColumn(
        SPEED_RATIO, "speed\n× float", "the float model's step time divided by this one", 1, 2, suffix="×"
    ),
    MetricColumn(
        "speed/images_per_s", "images\nper s", "pictures or videos per second, everything included", 1
    ),
    MetricColumn("speed/frames_per_s", "frames\nper s", "video frames per second, everything included", 1),
    MetricColumn(
        DENOISER_BYTES, "denoiser\nMB", "memory of the denoiser's weights, in 10⁶ bytes", -1, scale=1e-6
    ),
    MetricColumn(
        DENOISER_RATIO,
        "denoiser\nsmaller",
        "the float denoiser's memory divided by this one",
        1,
        2,
        suffix="×",
    ),
    MetricColumn(
        "memory/text_encoder_ratio",
        "encoders\nsmaller",
        "the float text encoders' memory divided by these",
        1,
        2,
        suffix="×",
    ),
    MetricColumn(
        PSNR_DB, "PSNR\ndB", "closeness to the float model's pictures; equal pictures have no noise", 1, 1
    ),
    MetricColumn(
        "quality/ssim",
        "SSIM",
        "structural similarity to the float model's pictures, 1 at most",
        1,
        4,
        ceiling=1.0,
    ),
    MetricColumn(
        "quality/ms_ssim", "MS-SSIM", "structural similarity at several scales, 1 at most", 1, 4, ceiling=1.0
    ),
    MetricColumn("quality/lpips", "LPIPS", "perceptual distance to the float model's pictures", -1, 4),
    MetricColumn(
        "quality/effnet_distance",
        "EffNet\ndistance",
        "distance of EfficientNet features to those of the float pictures",
        -1,
        5,
    ),
    MetricColumn("quality/clip_score", "CLIP\nscore", "how well pictures fit their prompts", 1, 2),
    MetricColumn(
        "quality/latent_rel_err",
        "latent\nerror, %",
        "distance of the last latents from the float model's",
        -1,
        2,
        100,
    ),
    MetricColumn(
        "clip/cosine_mean",
        "embedding\ncosine",
        "likeness of the prompts' embeddings to the float text encoders'",
        1,
        5,
        ceiling=1.0,
    ),
    MetricColumn(
        "quant/output_sqnr_db_min",
        "layer SQNR\nmin, dB",
        "signal-to-noise ratio of the worst INT8 layer's output",
        1,
        1,
    ),
)


PSNR_COLUMN = MetricColumn(PSNR_DB, "PSNR", "", 1, 1, suffix=" dB")
