"""Why a run lacks a metric that other runs have.

Shown where its cell is empty, in the table of the report and in that of the terminal.
"""

from collections.abc import Mapping

from int8run.layers.plan import FLOAT
from int8run.metrics.names import DTYPE_FLOOR, METRICS, NOISE_FLOOR, UNKNOWN
from int8run.report.columns import (
    ATTENTION_SQNR_DB,
    MACS_INT8_SHARE,
    SPEED_RATIO,
    VAE_DECODE_RATIO,
    VAE_PSNR_DB,
)
from int8run.tracking.run_record import FAILED, FINISHED, RUNNING, Record

FRAMES_PER_S = "speed/frames_per_s"
WITHOUT_MASK = "no input tells a mask, or all pixels are on its other side"
# what lies in the images and inputs of a run, and not in its settings
REASONS_OF_IMAGES = {
    "quality/ms_ssim": "the images are too small for it",
    "quality/masked_psnr_db": WITHOUT_MASK,
    "quality/unmasked_psnr_db": WITHOUT_MASK,
    "quality/flicker_err": "images have no neighbouring frames",
    "quality/drift": "no video begins with an image",
}
LAYER_SQNR = "quant/output_sqnr_db_min"
# metrics of parts that are INT8 where a setting asks for it
PART_SETTINGS = {
    ATTENTION_SQNR_DB: "int8.attention",
    VAE_PSNR_DB: "int8.vae",
    VAE_DECODE_RATIO: "int8.vae",
}
ENCODER_METRICS = ("clip/cosine_mean", "memory/text_encoder_ratio")


def explain_missing(record: Record, metric: str) -> str:
    """Why a run does not have a metric, in a few words; `not measured` where its settings do not tell.

    Args:
        record: of the run.
        metric: a name that its metrics lack, or whose value is not a number.
    """
    if record.state != FINISHED:
        return explain_state(record.state)
    if metric in record.metrics:
        return "the result is not a number"
    if metric == FRAMES_PER_S:
        return "images have no frames"
    params = record.params
    by_baseline = explain_by_baseline(metric, params.get("metrics.baseline", ""))
    return by_baseline or explain_by_settings(metric, params) or "not measured"


def explain_state(state: str) -> str:
    """Why a run that is not finished has no metrics."""
    if state == RUNNING:
        return "the run has not ended"
    if state == FAILED:
        return "the run failed"
    return "the run was killed"


def explain_by_baseline(metric: str, baseline: str) -> str:
    """What `metrics.baseline` takes away; empty where it is not the reason."""
    if baseline not in ("none", "cached"):
        return ""
    if metric in (LAYER_SQNR, "clip/cosine_mean"):
        return f"metrics.baseline={baseline}: the float model was not in memory"
    if metric == SPEED_RATIO and baseline == "cached":
        return "metrics.baseline=cached: the float model's images are of an earlier run"
    needs_float_images = metric == SPEED_RATIO or metric.startswith("quality/")
    if needs_float_images and baseline == "none":
        return "metrics.baseline=none: the float model did not run"
    return ""


def explain_by_settings(metric: str, params: Mapping[str, str]) -> str:
    """What other settings leave out; empty where they do not.

    Args:
        metric: that is missing.
        params: the settings of the run, flat.
    """
    if metric in (NOISE_FLOOR, DTYPE_FLOOR) and params.get("metrics.noise_floor") != "True":
        return "metrics.noise_floor=false"
    if metric in REASONS_OF_IMAGES:
        return REASONS_OF_IMAGES[metric]
    measure = METRICS.get(metric, UNKNOWN).measure
    if measure is not None:
        return f"metrics.perceptual does not name {measure}, or it could not be computed"
    if metric in ENCODER_METRICS and params.get("clip") == "keep":
        return "clip=keep: the text encoders are not quantized"
    if metric in PART_SETTINGS:
        setting = PART_SETTINGS[metric]
        # a run from before there was the setting has no INT8 part either
        return f"{setting}=float" if params.get(setting, FLOAT) == FLOAT else ""
    if metric in (LAYER_SQNR, MACS_INT8_SHARE) and params.get("int8.enable") == "False":
        return "int8.enable=false: no layer is INT8"
    if metric == LAYER_SQNR and params.get("metrics.layers") == "False":
        return "metrics.layers=false"
    return ""
