"""Why a run lacks a metric that other runs have.

Shown where its cell is empty, in the table of the report and in that of the terminal.
"""

from int8run.tracking.run_record import FAILED, FINISHED, RUNNING, Record

MS_SSIM, FRAMES_PER_S, LAYER_SQNR = "quality/ms_ssim", "speed/frames_per_s", "quant/output_sqnr_db_min"
PERCEPTUAL_METRICS = ("quality/lpips", "quality/effnet_distance", "quality/clip_score")
SPEED_RATIO = "speed/ratio_vs_float"


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
    reason = explain_by_baseline(metric, record.params.get("metrics.baseline", ""))
    return reason or explain_by_settings(metric, record.params) or "not measured"


def explain_state(state: str) -> str:
    """What a run that is not finished has no metrics for."""
    if state == RUNNING:
        return "the run has not ended"
    return "the run failed" if state == FAILED else "the run was killed"


def explain_by_baseline(metric: str, baseline: str) -> str:
    """What `metrics.baseline` takes away; empty where it is not the reason."""
    if baseline == "none" and (metric == SPEED_RATIO or metric.startswith(("quality/", "clip/"))):
        return "metrics.baseline=none: the float model did not run"
    if baseline == "cached" and metric == SPEED_RATIO:
        return "metrics.baseline=cached: the float model's images are of an earlier run"
    if baseline in ("none", "cached") and metric in (LAYER_SQNR, "clip/cosine_mean"):
        return f"metrics.baseline={baseline}: the float model was not in memory"
    return ""


def explain_by_settings(metric: str, params: dict[str, str]) -> str:
    """What other settings leave out; empty where they do not."""
    if metric in PERCEPTUAL_METRICS:
        name = metric.removeprefix("quality/")
        return f"metrics.perceptual does not name {name}, or it could not be computed"
    if metric == MS_SSIM:
        return "the images are too small for it"
    is_encoder_metric = metric.startswith("clip/") or metric == "memory/text_encoder_ratio"
    if is_encoder_metric and params.get("clip") == "keep":
        return "clip=keep: the text encoders are not quantized"
    if metric == LAYER_SQNR and params.get("metrics.layers") == "False":
        return "metrics.layers=false"
    if metric == LAYER_SQNR and params.get("int8.enable") == "False":
        return "int8.enable=false: no layer is INT8"
    return ""
