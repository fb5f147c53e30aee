"""The metrics of a run by their names in metrics.json, the report and MLflow: what each is, and what is good.

`metrics.settings` checks `metrics.objective` against them before anything is loaded, and a sweep chooses its
best job by their directions. What `metrics.perceptual` can add describes itself, see `metrics.base`; other
new numbers get their lines here. Tests compare the names with what runs measure.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from int8run.metrics.base import LESS, MORE, NEITHER, Metric, Scope
from int8run.metrics.catalog import describe_measured, load_measure_classes

SAMPLES, INDEPENDENT = "quality/samples", "quality/independent_samples"
NOISE_FLOOR, DTYPE_FLOOR = "quality/noise_floor_db", "quality/dtype_floor_db"
# endings of the names of what a metric has besides its mean: the limits of the interval, and the median
LOW, HIGH, MEDIAN = "_low", "_high", "_median"
# of a run as a whole; other numbers of this group are means over its samples
OF_A_RUN = re.compile(
    r"quality/(half_error_step|float_layers_from_same_file|independent_samples|measures_left_out|samples|.+_gap_db|.+_p)"
)
SPEED_RATIO = "speed/ratio_vs_float"
STEPS_SKIPPED_SHARE = "speed/steps_skipped_share"
SCATTERS = "speed/scatters"
# series of metrics.json: step times of each stretch in which both models took turns
BLOCK_STEP_MS, FLOAT_BLOCK_STEP_MS = "series/block_step_ms", "series/float_block_step_ms"

# what runs have without being asked
RUN_METRICS: Mapping[str, Metric] = {
    "budget/asked_db": Metric(NEITHER, "the quality that `quality_db` asks for"),
    "budget/layers_4_bits": Metric(NEITHER, "layers that it gives 4 bits (`int8.bits=auto`)"),
    "budget/layers_6_bits": Metric(NEITHER, "the same with 6"),
    "budget/layers_8_bits": Metric(NEITHER, "the same with 8"),
    "budget/layers_kept": Metric(LESS, "layers and attentions that stay float for it"),
    "budget/memory_ratio": Metric(
        LESS, "the denoiser's memory over that with all in INT8, at the fewest bits"
    ),
    "budget/reached_db": Metric(MORE, "the quality with them"),
    "budget/step_ratio": Metric(LESS, "the time of a step over that with all in INT8, at the fewest bits"),
    "budget/without_db": Metric(MORE, "the quality with all in INT8, at the fewest bits"),
    "build/load_s": Metric(LESS, "seconds to load the model; 0 when an earlier job did"),
    "build/quantize_s": Metric(LESS, "seconds to quantize it; 0 when an earlier job did"),
    "build/read_bytes": Metric(LESS, "what `task=quantize` read"),
    "build/read_bytes_per_s": Metric(MORE, "how fast it read"),
    "build/written_bytes": Metric(LESS, "what it wrote"),
    "cache/float_psnr_db": Metric(MORE, "PSNR of the float model with the step cache to it without"),
    "cache/float_ratio": Metric(MORE, "the float model's mean step time over that of it with the step cache"),
    "cache/int8_psnr_db": Metric(MORE, "PSNR of INT8 without the step cache to float"),
    "cache/int8_ratio": Metric(MORE, "the float model's mean step time over that of INT8 without the cache"),
    "cache/macs_skipped_share": Metric(MORE, "share of the denoiser's multiply-adds that the cache saved"),
    "cache/psnr_to_int8_db": Metric(MORE, "PSNR of INT8 with the step cache to it without"),
    "cache/ratio_vs_int8": Metric(MORE, "INT8's mean step time without the step cache, over that with it"),
    "cache/step_ms_mean": Metric(LESS, "mean time of a denoising step, skipped ones included"),
    "cache/steps_computed": Metric(LESS, "steps that the step cache computed whole"),
    "cache/steps_skipped": Metric(MORE, "steps in which it reused something"),
    "clip/cosine_mean": Metric(MORE, "cosine of the prompt embeddings with the float text encoders', mean"),
    "clip/cosine_min": Metric(MORE, "the same of the worst prompt"),
    "clip/layers_float": Metric(LESS, "layers of the text encoders that stay float"),
    "clip/layers_quantized": Metric(MORE, "quantized layers of the text encoders"),
    "clip/rel_err": Metric(LESS, "relative error of the prompt embeddings"),
    "clip/weight_sqnr_db_mean": Metric(MORE, "SQNR of the text encoders' weights, mean over layers"),
    "clip/weight_sqnr_db_min": Metric(MORE, "the same of the worst layer"),
    "controlnet/layers_float": Metric(LESS, "layers of the ControlNet that stay float"),
    "controlnet/layers_int8": Metric(MORE, "those in INT8"),
    "controlnet/output_sqnr_db_min": Metric(MORE, "SQNR of the output of its worst INT8 layer"),
    "controlnet/weight_sqnr_db_min": Metric(MORE, "SQNR of the worst of their weights"),
    "energy/joules_per_image": Metric(LESS, "energy of an image or a video: of the CPU packages, or the GPU"),
    "float/denoiser_bytes": Metric(LESS, "memory of the float denoiser's weights"),
    "float/drift": Metric(
        NEITHER, "how far the float model's video is from the image that it begins with", lowest=0
    ),
    "float/frames_per_s": Metric(MORE, "video frames per second of the float model"),
    "float/images_per_s": Metric(MORE, "images or videos per second of the float model"),
    "float/joules_per_image": Metric(LESS, "the same of the float model"),
    "float/peak_bytes": Metric(LESS, "largest memory while the float model generated"),
    "float/step_ms_p50": Metric(LESS, "median time of a denoising step of the float model"),
    "float/step_ms_p90": Metric(LESS, "the time that 90 % of its steps do not exceed"),
    "float/text_encoder_bytes": Metric(LESS, "memory of the float text encoders' weights"),
    "lora/change_ms": Metric(LESS, "milliseconds in which the LoRAs and their strengths were set"),
    "lora/clipped_share": Metric(LESS, "share of the weights that stochastic rounding clips"),
    "lora/layers_bake": Metric(NEITHER, "INT8 layers whose LoRAs are in the quantized weight"),
    "lora/layers_dynamic": Metric(NEITHER, "INT8 layers whose LoRAs are a branch beside the weight"),
    "lora/layers_stochastic": Metric(NEITHER, "INT8 layers whose LoRAs are randomly rounded into it"),
    "lora/modules_matched": Metric(MORE, "modules of the LoRA files that a layer has"),
    "lora/modules_unmatched": Metric(LESS, "modules of the LoRA files that no layer has"),
    "lora/overhead_ratio": Metric(LESS, "time of a step with the LoRAs' branches, over that without them"),
    "memory/controlnet_bytes": Metric(LESS, "memory of the ControlNet's weights"),
    "memory/controlnet_ratio": Metric(MORE, "the float ControlNet's memory over it"),
    "memory/denoiser_bytes": Metric(LESS, "memory of the denoiser's weights"),
    "memory/denoiser_ratio": Metric(MORE, "the float denoiser's memory over it"),
    "memory/peak_bytes": Metric(LESS, "largest memory while the model generated"),
    "memory/text_encoder_bytes": Metric(LESS, "memory of the text encoders' weights"),
    "memory/text_encoder_ratio": Metric(MORE, "the float text encoders' memory over it"),
    "quality/dtype_floor_db": Metric(NEITHER, "PSNR of the float model in another dtype to itself", lowest=0),
    "quality/dtype_floor_gap_db": Metric(MORE, "PSNR of INT8 less that of the float model in another dtype"),
    "quality/dtype_floor_p": Metric(NEITHER, "p-value that the gap is within `metrics.margin_db`"),
    "quality/drift": Metric(
        NEITHER, "how far a video's frames are from the image that it begins with", lowest=0
    ),
    "quality/flicker_err": Metric(
        LESS, "how much of INT8's error moves from frame to frame of a video", lowest=0
    ),
    "quality/float_layers_from_same_file": Metric(NEITHER, "float layers that come from the checked file"),
    "quality/frame_err": Metric(LESS, "INT8's error in the frames of a video", lowest=0),
    "quality/half_error_step": Metric(NEITHER, "first step with half of the last one's latent error"),
    "quality/latent_rel_err": Metric(LESS, "relative error of the last latents", lowest=0),
    "quality/masked_psnr_db": Metric(MORE, "PSNR inside the mask of an edit", lowest=0),
    "quality/masked_share": Metric(
        NEITHER, "share of the pixels that is inside the mask of an edit", lowest=0, highest=1
    ),
    "quality/noise_floor_db": Metric(
        NEITHER, "PSNR of the float model, computed otherwise, to itself", lowest=0
    ),
    "quality/noise_floor_gap_db": Metric(MORE, "PSNR of INT8 less that of the float model to itself"),
    "quality/noise_floor_p": Metric(NEITHER, "p-value that the gap is within `metrics.margin_db`"),
    "quality/psnr_db": Metric(MORE, "peak signal-to-noise ratio to the float model's images", lowest=0),
    "quality/samples": Metric(NEITHER, "images or videos that were compared"),
    "quality/independent_samples": Metric(NEITHER, "prompts of these, where one has several seeds"),
    "quality/ssim": Metric(MORE, "structural similarity to the float model's images", lowest=-1, highest=1),
    "quality/measures_left_out": Metric(LESS, "metrics that were asked for and could not be computed"),
    "quality/unmasked_psnr_db": Metric(MORE, "PSNR outside the mask of an edit", lowest=0),
    "quant/attention_float": Metric(LESS, "attentions of the INT8 model that stay float"),
    "quant/attention_int8": Metric(MORE, "attentions in INT8"),
    "quant/attention_sqnr_db_mean": Metric(MORE, "SQNR of the INT8 attentions' outputs, mean over modules"),
    "quant/attention_sqnr_db_min": Metric(MORE, "the same of the worst module"),
    "quant/fallback_layers": Metric(LESS, "INT8 layers on another backend, or in float for small batches"),
    "quant/layers_4_bits": Metric(NEITHER, "INT8 layers whose weights have 4 bits"),
    "quant/layers_6_bits": Metric(NEITHER, "the same with 6"),
    "quant/layers_without_their_bits": Metric(LESS, "INT8 layers with 8 bits where fewer were asked for"),
    "quant/layers_float_by_choice": Metric(NEITHER, "layers that could be INT8 and are faster in float"),
    "quant/layers_with_backends_left_out": Metric(LESS, "layers that some backend failed to run here"),
    "quant/layers_float": Metric(LESS, "layers that stay float"),
    "quant/layers_int8": Metric(MORE, "layers in INT8"),
    "quant/macs_int8_share": Metric(MORE, "share of the denoiser's multiply-adds that are INT8"),
    "quant/output_sqnr_db_mean": Metric(MORE, "SQNR of the INT8 layers' outputs, mean over layers"),
    "quant/output_sqnr_db_min": Metric(MORE, "the same of the worst layer"),
    "quant/params_int8_share": Metric(MORE, "share of the denoiser's parameters that are INT8"),
    "quant/weight_sqnr_db_mean": Metric(MORE, "SQNR of the INT8 layers' weights, mean over layers"),
    "quant/weight_sqnr_db_min": Metric(MORE, "the same of the worst layer"),
    "speed/frames_per_s": Metric(MORE, "video frames per second"),
    "speed/images_per_s": Metric(MORE, "images or videos per second"),
    "speed/ratio_vs_best_float": Metric(MORE, "step time in the fastest float dtype, over this one"),
    "speed/ratio_vs_float": Metric(MORE, "the float model's step time over this one"),
    "speed/scatters": Metric(LESS, "1 where step times scatter so much that speeds say little, else 0"),
    "speed/steps_skipped_share": Metric(MORE, "share of the steps in which a step cache reused something"),
    "speed/step_ms_p50": Metric(
        LESS,
        "median time of a denoising step; with `int8.steps` the mean of those of both precisions",
    ),
    "speed/step_ms_p90": Metric(LESS, "the time that 90 % of the steps do not exceed; as for the median"),
    "steps/float": Metric(NEITHER, "steps of an image that the float denoiser computes, with `int8.steps`"),
    "steps/int8": Metric(NEITHER, "steps of an image that the INT8 denoiser computes, with `int8.steps`"),
    "vae/decode_ms": Metric(LESS, "time in which the INT8 VAE decodes the first latents"),
    "vae/decode_ratio": Metric(MORE, "the float VAE's time for them over it"),
    "vae/layers_float": Metric(LESS, "Linears and convolutions of the VAE that stay float"),
    "vae/layers_int8": Metric(MORE, "those in INT8"),
    "vae/memory_bytes": Metric(LESS, "memory of the INT8 VAE"),
    "vae/memory_ratio": Metric(MORE, "the float VAE's memory over it"),
    "vae/psnr_db": Metric(MORE, "PSNR of what it decodes to what the float VAE makes of the same latents"),
    "vae/weight_sqnr_db_min": Metric(MORE, "SQNR of the worst of its weights"),
}


def name_statistics(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The names of limits and medians, by those of the metrics that have them."""
    added = {}
    for name, metric in metrics.items():
        added[f"{name}{LOW}"] = replace(metric, description=f"lower limit of the interval of {name}")
        added[f"{name}{HIGH}"] = replace(metric, description=f"upper limit of the interval of {name}")
        added[f"{name}{MEDIAN}"] = replace(metric, description=f"median of {name} over the samples")
    return added


def select_means(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Those of the metrics without being asked that are means over samples."""
    means = {}
    for name, metric in metrics.items():
        is_of_images = name.startswith("quality/") or name == "float/drift"
        if is_of_images and not OF_A_RUN.fullmatch(name):
            means[name] = metric
    return means


# what runs measure, without limits and medians
MEASURED: Mapping[str, Metric] = {**RUN_METRICS, **describe_measured(load_measure_classes())}
OF_SAMPLES = {
    name: measure for name, measure in load_measure_classes().items() if measure.scope is not Scope.SET
}
MEANS = {**select_means(RUN_METRICS), **describe_measured(OF_SAMPLES)}
SPEED_LIMITS = {f"{SPEED_RATIO}{end}": RUN_METRICS[SPEED_RATIO] for end in (LOW, HIGH)}
METRICS: Mapping[str, Metric] = {**MEASURED, **name_statistics(MEANS), **SPEED_LIMITS}

UNKNOWN = Metric(NEITHER, "metrics.objective")  # of a run by another version
